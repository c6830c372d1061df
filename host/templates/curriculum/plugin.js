// The curriculum: rows in the order of the dataset, again and again, but for those that were mastered when they were last
// answered. Once all are, it begins anew.

// The plugin's config: the mean reward from which on a row is mastered.
const settings = { mastered: 1 };

// What is thrown is the `plugin-error` of the WIT, `config`, `input` or `internal`.
const failure = (tag, message) => ({ tag, val: message });

export const planning = {
  configure(config) {
    for (const [key, value] of Object.entries(JSON.parse(config))) {
      if (!Object.hasOwn(settings, key)) {
        throw failure("config", `unknown setting \`${key}\``);
      }
      if (typeof value !== "number") {
        throw failure("config", `\`${key}\` must be a number`);
      }
      settings[key] = value;
    }
  },

  plan(state, outcomes, budget) {
    // Of a 64-bit number `Number` loses nothing below 2^53.
    const rows = Number(budget.rows);
    let { position, mastered } = read(state, rows);
    for (const outcome of outcomes) {
      const rewards = [...outcome.rewards];
      if (rewards.length > 0) {
        const mean = rewards.reduce((a, b) => a + b, 0) / rewards.length;
        const row = Number(outcome.row);
        mean >= settings.mastered ? mastered.add(row) : mastered.delete(row);
      }
    }
    if (mastered.size === rows) {
      mastered = new Set();
    }
    // As many rows as the budget has prompts, none of them twice.
    const picks = [];
    for (let i = 0; i < rows && picks.length < budget.prompts; i += 1) {
      const row = position % rows;
      position += 1;
      if (!mastered.has(row)) {
        picks.push({ row, rollouts: budget.groupSize });
      }
    }
    return {
      picks,
      epoch: position / rows,
      state: bytes(JSON.stringify({ rows, position, mastered: [...mastered].sort((a, b) => a - b) })),
      metrics: [{ name: "mastered", value: mastered.size }],
      report: [],
    };
  },
};

/** Rows that have been passed so far, over all epochs, and the mastered ones. An empty state is a beginning. */
function read(state, rows) {
  if (state.length === 0) {
    return { position: 0, mastered: new Set() };
  }
  let value;
  try {
    value = JSON.parse(Array.from(state, (byte) => String.fromCharCode(byte)).join(""));
  } catch {
    value = null;
  }
  if (!Number.isInteger(value?.rows) || !Array.isArray(value.mastered)) {
    throw failure("input", "state is none of this curriculum's");
  }
  if (value.rows !== rows) {
    throw failure("input", `state was made for ${value.rows} rows, the dataset has ${rows}`);
  }
  return { position: value.position, mastered: new Set(value.mastered) };
}

/** ASCII only. */
const bytes = (text) => Uint8Array.from(text, (c) => c.charCodeAt(0));
