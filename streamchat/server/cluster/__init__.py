"""`streamchat serve --ray`: the server on a Ray cluster, with one model per replica."""
