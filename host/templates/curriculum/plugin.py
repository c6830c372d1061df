"""The curriculum: rows in the order of the dataset, again and again, but for those that were mastered when they were last
answered. Once all are, it begins anew."""

import json

from componentize_py_types import Err
from wit_world import exports
from wit_world.imports import types

# The plugin's config: the mean reward from which on a row is mastered.
settings = {"mastered": 1.0}


class Planning(exports.Planning):
    def configure(self, config):
        for key, value in json.loads(config, parse_int=float).items():
            if key not in settings:
                raise Err(types.PluginError_Config(f"unknown setting `{key}`"))
            if type(value) is not float:
                raise Err(types.PluginError_Config(f"`{key}` must be a number"))
            settings[key] = value

    def plan(self, state, outcomes, budget):
        position, mastered = read(state, budget.rows)
        for outcome in outcomes:
            if outcome.rewards:
                mean = sum(outcome.rewards) / len(outcome.rewards)
                (mastered.add if mean >= settings["mastered"] else mastered.discard)(outcome.row)
        if len(mastered) == budget.rows:
            mastered = set()
        # As many rows as the budget has prompts, none of them twice.
        picks = []
        for _ in range(budget.rows):
            if len(picks) == budget.prompts:
                break
            row = position % budget.rows
            position += 1
            if row not in mastered:
                picks.append(types.Pick(row, budget.group_size))
        metrics = [types.Metric("mastered", float(len(mastered)))]
        state = {"rows": budget.rows, "position": position, "mastered": sorted(mastered)}
        blob = json.dumps(state).encode()
        return types.StepPlan(picks, position / budget.rows, blob, metrics, [])


def read(state, rows):
    """Rows that have been passed so far, over all epochs, and the mastered ones. An empty state is a beginning."""
    if not state:
        return 0, set()
    try:
        value = json.loads(bytes(state))
        was, position, mastered = value["rows"], value["position"], set(value["mastered"])
    except (ValueError, KeyError, TypeError):
        raise Err(types.PluginError_Input("state is none of this curriculum's"))
    if was != rows:
        message = f"state was made for {was} rows, the dataset has {rows}"
        raise Err(types.PluginError_Input(message))
    return position, mastered
