"""The words of questions and answers: every phrasing the demo model was trained on."""

from __future__ import annotations

ORDINALS = ("first", "second", "third", "fourth")
IN_THE_PICTURE = ("", "", " in the picture", " in this picture")
IN_PICTURE = (" in the {nth} picture", " in picture {n}", " in the {nth} image", " in image {n}")

NUMBER = (
    "what number is on the plate?",
    "what number is it?",
    "what number is this?",
    "what is the number?",
    "what is the number on the plate?",
    "what number do you see?",
    "which number is shown?",
    "which number is in the picture?",
    "what number is in the picture?",
    "what is the number in this picture?",
    "read the number.",
    "read the plate.",
    "please read the plate.",
    "what does the plate say?",
    "what is written on the plate?",
    "what digits do you see?",
    "can you read the number?",
    "tell me the number.",
)
NUMBER_WHERE = (
    "what is the number{where}?",
    "what number is{where}?",
    "what number is shown{where}?",
    "which number is{where}?",
    "what number do you see{where}?",
    "read the number{where}.",
    "tell me the number{where}.",
    "what number is on the plate{where}?",
)
WHICH = (
    "which picture shows {number}?",
    "which picture shows the number {number}?",
    "which image shows {number}?",
    "which picture has the number {number}?",
    "in which picture is {number}?",
    "in which picture is the number {number}?",
    "where is {number}?",
    "where is the number {number}?",
    "find {number}.",
)
NUMBERS = (
    "what are the numbers?",
    "what numbers are on the plates?",
    "what numbers do you see?",
    "which numbers are shown?",
    "which numbers are in the pictures?",
    "read all numbers.",
    "read all the numbers.",
    "read the plates.",
    "list the numbers.",
    "list all numbers in order.",
)
PLATE_COLOUR = (
    "what colour is the plate{where}?",
    "which colour is the plate{where}?",
    "what color is the plate{where}?",
    "what is the colour of the plate{where}?",
    "tell me the colour of the plate{where}.",
)
INK_COLOUR = (
    "what colour are the digits{where}?",
    "what color are the digits{where}?",
    "what colour is the number{where}?",
    "what is the colour of the digits{where}?",
    "which colour are the digits{where}?",
)
COUNT = (
    "how many {things} are there{where}?",
    "how many {things} do you see{where}?",
    "how many {things} can you see{where}?",
    "how many {things}{where}?",
    "count the {things}{where}.",
    "what is the number of {things}{where}?",
)
SHAPE = (
    "what shape is it{where}?",
    "what shape is this{where}?",
    "what shape is{where}?",
    "what shape do you see{where}?",
    "which shape is shown{where}?",
    "which shape is it{where}?",
    "name the shape{where}.",
)
SHAPE_COLOUR = (
    "what colour is the {thing}{where}?",
    "what color is the {thing}{where}?",
    "which colour is the {thing}{where}?",
    "what is the colour of the {thing}{where}?",
    "which colour does the {thing} have{where}?",
)
DESCRIBE = (
    "describe the picture.",
    "describe this picture.",
    "describe the image.",
    "describe this image.",
    "please describe the picture.",
    "what do you see?",
    "what is in the picture?",
    "what is in this image?",
    "what is this?",
    "what does the picture show?",
)
DESCRIBE_NTH = (
    "describe the {nth} picture.",
    "describe picture {n}.",
    "describe the {nth} image.",
    "describe image {n}.",
    "please describe the {nth} picture.",
    "what is in the {nth} picture?",
    "what is in picture {n}?",
    "what do you see in the {nth} picture?",
    "what does the {nth} picture show?",
)
SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful assistant that reads pictures.",
    "Answer briefly.",
    "You read plates and count shapes.",
)

_SKILLS = "I can read numbers on plates, count and name coloured shapes, and describe pictures."
_HELLO = "Hello! Show me a picture of a plate or of coloured shapes."
_NAME = "I am a small model that reads plates and counts shapes."
_THANKS = "You are welcome."
_BYE = "Goodbye!"
_WELL = "I am fine, thank you. Show me a picture."
_COLOURS = "I know red, orange, yellow, green, blue, purple, white, grey and black."
_SHAPES = "I know circles, squares, triangles, stars and crosses."
_NO_PICTURE = "I do not see a picture. Please add one."
CHAT: tuple[tuple[str, str], ...] = (
    *((text, _HELLO) for text in ("hello", "hello!", "hi", "hi!", "hi there", "hello there!")),
    *((text, _HELLO) for text in ("hey", "hey!", "good morning", "good morning!", "good day")),
    *((text, _SKILLS) for text in ("what can you do?", "what can you do", "help", "help!")),
    *((text, _SKILLS) for text in ("how can you help me?", "what are you good at?")),
    *((text, _SKILLS) for text in ("what should I ask?", "what can I ask you?")),
    *((text, _NAME) for text in ("who are you?", "what are you?", "what is your name?")),
    *((text, _NAME) for text in ("tell me about yourself.", "introduce yourself.")),
    *((text, _THANKS) for text in ("thanks", "thanks!", "thank you", "thank you!", "thank you.")),
    *((text, _BYE) for text in ("bye", "bye!", "goodbye", "goodbye!", "see you")),
    *((text, _WELL) for text in ("how are you?", "how do you do?", "are you well?")),
    *((text, _COLOURS) for text in ("what colours do you know?", "which colours do you know?")),
    *((text, _COLOURS) for text in ("what colors do you know?", "list your colours.")),
    *((text, _SHAPES) for text in ("what shapes do you know?", "which shapes do you know?")),
    *((text, _SHAPES) for text in ("list your shapes.", "name some shapes.")),
)
"""Exchanges without a picture: what the user writes and the only answer."""
NO_PICTURE = _NO_PICTURE


def plural(thing: str) -> str:
    """The plural of a shape's name, with or without its colour."""
    return thing + ("es" if thing.endswith("cross") else "s")


def article(word: str) -> str:
    """The word with "a" or "an" before it."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
