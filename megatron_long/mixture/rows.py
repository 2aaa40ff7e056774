"""What the first stage leaves of each file: a row of metadata for each document, tokens, counts."""

import numpy as np

ROW_DTYPE = np.dtype(
    [
        ("source", "<u2"),
        ("file", "<u4"),
        ("line", "<u8"),
        ("length_tokens", "<u4"),
        ("drop_key", "<u8"),
        ("order_key", "<u8"),
        ("offset", "<u8"),
    ]
)
"""One row per document; `length_tokens` counts BOS and EOD, `offset` counts tokens of `tokens.bin`."""
TOKENS_FILE, ROWS_FILE, INFO_FILE = "tokens.bin", "rows.npy", "info.json"
