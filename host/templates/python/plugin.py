"""The reward: how near the last number of an answer is to the number in the row's column `answer`."""

import json
import math

from componentize_py_types import Err
from wit_world import exports
from wit_world.imports import types

DEFAULT = {
    # Relative error that still earns 1.
    "tolerance": 1e-6,
    # What a number just outside of the tolerance would earn at an error of 0.
    "partial": 0.1,
}
settings = DEFAULT


class Scoring(exports.Scoring):
    def configure(self, config):
        global settings
        wanted = dict(DEFAULT)
        for key, value in json.loads(config, parse_int=float).items():
            if key not in wanted:
                raise Err(types.PluginError_Config(f"unknown setting `{key}`"))
            if type(value) is not float or not value >= 0:
                message = f"`{key}` must be a number of at least 0"
                raise Err(types.PluginError_Config(message))
            wanted[key] = value
        settings = wanted

    def score(self, questions, samples):
        golds = [gold(question.row) for question in questions]
        return [verdict(sample, golds[sample.question]) for sample in samples]


def verdict(sample, gold):
    if gold is None:
        return types.Verdict_Skip("column `answer` holds no number")
    answer = sample.completion if sample.answer is None else sample.answer
    number = last_number(answer)
    if number is None:
        return types.Verdict_Value(types.Scored(0.0, []))
    error = abs(number - gold) / max(abs(gold), 1.0)
    total = 1.0 if error <= settings["tolerance"] else settings["partial"] / (1.0 + error)
    return types.Verdict_Value(types.Scored(total, [types.Part("error", min(error, 1e9))]))


def gold(row):
    """The number in the row's column `answer`, or None if it holds none."""
    row = json.loads(row, parse_int=float)
    if "answer" not in row:
        raise Err(types.PluginError_Input("row has no column `answer`"))
    value = row["answer"]
    if isinstance(value, str):
        return last_number(value)
    return value if type(value) is float else None


def last_number(text):
    """The last decimal number of a text. Commas between its digits are ignored."""
    end = len(text)
    while end > 0 and text[end - 1] not in "0123456789":
        end -= 1
    start = end
    while start > 0 and text[start - 1] in "0123456789.,":
        start -= 1
    if start == end:
        return None
    # Of `1.2.3` the last two pieces are a number.
    pieces = text[start:end].replace(",", "").split(".")
    number = float(".".join(pieces[-2:]))
    if start > 0 and text[start - 1] == "-":
        number = -number
    return number if math.isfinite(number) else None
