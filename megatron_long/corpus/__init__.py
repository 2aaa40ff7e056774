"""Input: files of a corpus, and the documents in them."""
