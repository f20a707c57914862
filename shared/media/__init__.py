"""Media on their way in: bytes by URL, checked decoding, placeholder arithmetic, cache keys.

`data_url` and `fetch` get bytes · `address` says which networks may be asked · `kind` names kinds ·
`picture`, `video` and `audio` decode · `sizing` counts placeholders · `content_key` names an
embedding.
"""
