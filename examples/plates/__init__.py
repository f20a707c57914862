"""The demo model's world: drawn plates and shapes, questions about them, and the training of a
small model that answers."""
