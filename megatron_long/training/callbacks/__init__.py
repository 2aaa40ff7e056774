"""What watches a run: each listens to the events of `engine.callback`; `pretrain.py` puts them in order."""
