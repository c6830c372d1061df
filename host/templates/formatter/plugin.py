"""The formatter: a question and an instruction become a prompt; what stands behind the last `####` of a completion is its
answer, and what stands before it the reasoning."""

import json

from componentize_py_types import Err
from wit_world import exports
from wit_world.imports import types

MARK = "####"
DEFAULT = {
    # Column with the question.
    "column": "question",
    # Comes behind it; may be empty.
    "instruction": "Think first. Then write #### and the answer.",
}
settings = DEFAULT


class Formatting(exports.Formatting):
    def configure(self, config):
        global settings
        wanted = dict(DEFAULT)
        for key, value in json.loads(config).items():
            if key not in wanted:
                raise Err(types.PluginError_Config(f"unknown setting `{key}`"))
            if not isinstance(value, str):
                raise Err(types.PluginError_Config(f"`{key}` must be a text"))
            wanted[key] = value
        settings = wanted

    def format(self, rows):
        return [prompt(json.loads(row)) for row in rows]

    def parse(self, completions):
        return [parsed(completion) for completion in completions]


def prompt(row):
    column, instruction = settings["column"], settings["instruction"]
    question = row.get(column)
    if not isinstance(question, str):
        raise Err(types.PluginError_Input(f"row has no text in column `{column}`"))
    content = f"{question}\n\n{instruction}" if instruction else question
    return types.Prompt(types.PromptBody_Messages([types.Message("user", content)]), [])


def parsed(completion):
    reasoning, mark, answer = completion.rpartition(MARK)
    if not mark:
        return types.Parsed(filled(completion), None)
    return types.Parsed(filled(reasoning), filled(answer))


def filled(text):
    """The text without blanks around it; nothing if nothing is left."""
    return text.strip(" \t\r\n") or None
