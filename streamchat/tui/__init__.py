"""The full-screen app, based on Textual. Uses only the `ChatEngine` protocol and does not import torch."""
