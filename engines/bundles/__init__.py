"""What a bundle is: building, manifest, opening, packing, replaying, the targets it can hold."""
