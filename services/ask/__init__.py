"""`triptych ask`: send pictures and a question, stream the answer, draw where the time went."""
