"""The gateway: OpenAI-shaped HTTP in, server-sent events out. Owns each request; needs no torch.

`routes` HTTP · `openai_schema`, `openai_answers`, `problems` shapes · `ingest` body to descriptor ·
`admission` bounds · `dispatch` to the queues · `answer` tokens to text (pure) · `streams` events to
answers · `recovery` what to do when an attempt fails (pure) · `runner` one request from dispatch to
its end · `liveness` heartbeats and cancellation · `health`, `traces`, `metrics` for operators ·
`app` puts the parts together.
"""
