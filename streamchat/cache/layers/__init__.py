"""Cache layers: preallocated buffers, recurrent states, and the choice of a layer for each kind of transformers."""
