"""Callbacks for the events of `engine.callback`; `pretrain.py` defines their order."""
