"""`triptych ask`: send pictures, clips, sounds and a question, stream the answer, draw where the
time went."""
