"""The model's own tokenizer, and fast engines that give the same ids."""
