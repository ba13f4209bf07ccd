"""The full-screen app, on Textual. Talks to the `ChatEngine` protocol only; loads no torch."""
