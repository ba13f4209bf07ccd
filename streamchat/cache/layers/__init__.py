"""Cache layers: preallocated buffers, recurrent states, and the streaming layer for each transformers layer."""
