"""`streamchat bench --gpu`: speed of one GPU, a row per model, weights and step."""
