"""Scenes composed from the embedded emoji: several objects on a canvas, everything about them known exactly.

    vlm_jax.data.sources.open_source("scenes:?size=96x64&objects=1-6", "train")    any number of examples, by index

Splits, by rules (words.py, scene.py), each with one thing that training scenes lack:

    train            five styles, the training concepts
    unseen_style     the style noto
    unseen_concepts  the held-out concepts
    unseen_pairs     an attribute of a thing, or two things together, held out by a hash of their names

Modules, lowest first: words (things and their English), pictures (one drawing), backgrounds, scene (what stands where,
boxes, masks, relations), texts, foils (false captions, questions), edits (second pictures), source (records).
"""
