"""A trained pair of small LLaVA models on images of handwritten digits: its data, training and evaluation."""
