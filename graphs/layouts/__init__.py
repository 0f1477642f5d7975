"""How patches and tiles of images lie in the vision stage's inputs: index arithmetic in numpy, for both rooms."""
