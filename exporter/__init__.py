"""The torch side: Hugging Face checkpoints become ONNX stages. The only room that knows model classes."""
