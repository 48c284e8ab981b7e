"""Text in and out: the tokenizer, the chat template, and the parsers of what a model says."""
