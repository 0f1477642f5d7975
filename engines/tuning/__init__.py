"""A plan search: the prune layer, the keep ratio and the threshold that cost least within a loss."""
