"""Text to token ids and back, without transformers.

`tokenizer` one loaded vocabulary · `chat_template` messages to text · `prompt` messages to ids with
placeholder runs · `detokenize` ids to text as they come · `stop` stop strings over token borders.
"""
