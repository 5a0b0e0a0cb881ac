"""Writes captured models as ONNX: the experts of a layer are one node, whatever their number (docs/onnx.md).

api.py        export_onnx(): options, capture;  publish.py  canonicalise, translate, write, check, publish
file_weights.py  --weights: what the file's weights are stored as
interface.py  names and shapes of the inputs and outputs
builder.py    a small front of onnx_ir
translate.py  the graph as an ONNX model: operators.py and shapes.py (ATen), moec_ops.py, gate.py, attention.py
experts.py    which node the experts of a layer become: portable.py, microsoft.py;  codes.py  stacks as codes and scales
write.py      weights made one at a time, external data, publishing
coverage.py   which experts stand in the file
verify.py     ONNX Runtime against the captured graph
session.py    which ONNX Runtime is installed, and where it runs
"""
