"""Pictures on their way in: bytes by URL, checked decoding, placeholder arithmetic, cache keys.

`data_url` and `fetch` get bytes · `address` says which networks may be asked · `picture` decodes ·
`sizing` counts placeholders · `content_key` names an embedding.
"""
