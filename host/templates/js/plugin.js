// The reward: how near the last number of an answer is to the number in the row's column `answer`.

const DEFAULT = {
  // Relative error that still earns 1.
  tolerance: 1e-6,
  // What a number just outside of the tolerance would earn at an error of 0.
  partial: 0.1,
};
let settings = DEFAULT;

// What is thrown is the `plugin-error` of the WIT, `config`, `input` or `internal`.
const failure = (tag, message) => ({ tag, val: message });

export const scoring = {
  configure(config) {
    const wanted = { ...DEFAULT };
    for (const [key, value] of Object.entries(JSON.parse(config))) {
      if (!Object.hasOwn(DEFAULT, key)) {
        throw failure("config", `unknown setting \`${key}\``);
      }
      if (typeof value !== "number" || !(value >= 0)) {
        throw failure("config", `\`${key}\` must be a number of at least 0`);
      }
      wanted[key] = value;
    }
    settings = wanted;
  },

  score(questions, samples) {
    const golds = questions.map((question) => gold(question.row));
    return samples.map((sample) => verdict(sample, golds[sample.question]));
  },
};

function verdict(sample, gold) {
  if (gold === null) {
    return { tag: "skip", val: "column `answer` holds no number" };
  }
  const number = lastNumber(sample.answer ?? sample.completion);
  if (number === null) {
    return { tag: "value", val: { total: 0, parts: [] } };
  }
  const error = Math.abs(number - gold) / Math.max(Math.abs(gold), 1);
  const total = error <= settings.tolerance ? 1 : settings.partial / (1 + error);
  const parts = [{ name: "error", value: Math.min(error, 1e9) }];
  return { tag: "value", val: { total, parts } };
}

/** The number in the row's column `answer`, or null if it holds none. */
function gold(row) {
  const columns = JSON.parse(row);
  if (!Object.hasOwn(columns, "answer")) {
    throw failure("input", "row has no column `answer`");
  }
  const value = columns.answer;
  if (typeof value === "string") {
    return lastNumber(value);
  }
  return typeof value === "number" ? value : null;
}

/** The last decimal number of a text. Commas between its digits are ignored. */
function lastNumber(text) {
  const isDigit = (at) => text[at] >= "0" && text[at] <= "9";
  let end = text.length;
  while (end > 0 && !isDigit(end - 1)) {
    end -= 1;
  }
  let start = end;
  while (start > 0 && (isDigit(start - 1) || text[start - 1] === "." || text[start - 1] === ",")) {
    start -= 1;
  }
  if (start === end) {
    return null;
  }
  // Of `1.2.3` the last two pieces are a number.
  const pieces = text.slice(start, end).replaceAll(",", "").split(".");
  const number = Number(pieces.slice(-2).join("."));
  const signed = text[start - 1] === "-" ? -number : number;
  return Number.isFinite(signed) ? signed : null;
}
