"""Operators that are kept whole, and why: what they do to an index cannot be told, or the result would change."""

from __future__ import annotations

from onnxshrink.registry import Rule, register

_SEQUENCE = "it works on a sequence of tensors, whose members are not followed"
_OPTIONAL = "it works on an optional value, which may not be there"
_TEXT = "it works on text, which has no zero"
_RANDOM = "it draws random numbers for every element, and fewer elements would change all that follow"
_LOOP = "its body shrinks by itself, and what passes from one iteration to the next is kept whole"
_LOSS = "it is a training loss: it averages over the batch and counts every class"

REFUSALS = {
    _RANDOM: "Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike",
    _SEQUENCE: """
        ConcatFromSequence SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength
        SequenceMap SplitToSequence
    """,
    _OPTIONAL: "Optional OptionalGetElement OptionalHasElement",
    _TEXT: "RegexFullMatch StringConcat StringNormalizer StringSplit TfIdfVectorizer",
    _LOOP: "Loop Scan",
    _LOSS: "NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss",
    "it decodes a compressed picture": "ImageDecoder",
    "which boxes it selects, and how many, depends on every box": "NonMaxSuppression",
    "its indices count the elements of the whole result, so that a channel less would shift them": "MaxUnpool",
    "it is a constant of text, or a sparse one": "Constant",
}

for _reason, _words in REFUSALS.items():
    for _op in _words.split():
        register(Rule(_op, refusal=_reason))
