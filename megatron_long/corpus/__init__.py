"""What is read: files of a corpus, and the documents in them."""
