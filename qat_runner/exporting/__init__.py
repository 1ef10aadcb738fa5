"""From a trained network to integers: static scalars, weights as codes, files that other tools can run."""

FORMATS = ("onnx", "torch", "safetensors")
"""They write model.onnx; model.pt2; model.safetensors and model.json."""
