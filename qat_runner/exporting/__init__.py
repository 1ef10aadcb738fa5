"""From a trained network to integers: static scalars, weights as codes, files that others can run."""

FORMATS = ("onnx", "torch", "safetensors")
"""model.onnx; model.pt2; model.safetensors and model.json"""
