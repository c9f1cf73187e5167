"""Pairs of responses for judges, from texts alone."""

from tokenratio.evaluation.judges.protocol import ResponsePair
from tokenratio.models.response import Response


def pair_of(id, sample, prompt, a, b):
    return ResponsePair(id, sample, prompt, Response(a), Response(b))
