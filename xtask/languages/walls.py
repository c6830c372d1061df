"""Evaluates completions: what of CPython a plugin can reach."""

import os
import random
import socket
import time

from wit_world import exports
from wit_world.imports import types

FIRST = random.random()


class Scoring(exports.Scoring):
    def configure(self, config):
        pass

    def score(self, questions, samples):
        return [types.Verdict_Value(types.Scored(float(eval(sample.completion)), [])) for sample in samples]
