"""Writes captured models as ONNX: the experts of a layer are one node, whatever their number (docs/onnx.md).

api.py        export_onnx(): capture, canonicalise, translate, write, verify, publish
interface.py  names and shapes of the inputs and outputs
batch.py      what the ragged graph's caches and slots are in a batch of rows
attention.py  attention over past and present keys
meaning.py    the graph as a module that torch.onnx translates
experts.py    which node the experts of a layer become: portable.py, microsoft.py
translate.py  the module as an ONNX model, through torch.onnx
write.py      weights made one at a time, external data, publishing
coverage.py   which experts stand in the file
verify.py     ONNX Runtime against the captured graph
"""
