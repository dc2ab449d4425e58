"""Networks and properties that were written elsewhere: ONNX and VNN-LIB."""
