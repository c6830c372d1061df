// The formatter: a question and an instruction become a prompt; what stands behind the last `####` of a completion is its
// answer, and what stands before it the reasoning.

const MARK = "####";
const DEFAULT = {
  // Column with the question.
  column: "question",
  // Comes behind it; may be empty.
  instruction: "Think first. Then write #### and the answer.",
};
let settings = DEFAULT;

// What is thrown is the `plugin-error` of the WIT, `config`, `input` or `internal`.
const failure = (tag, message) => ({ tag, val: message });

export const formatting = {
  configure(config) {
    const wanted = { ...DEFAULT };
    for (const [key, value] of Object.entries(JSON.parse(config))) {
      if (!Object.hasOwn(DEFAULT, key)) {
        throw failure("config", `unknown setting \`${key}\``);
      }
      if (typeof value !== "string") {
        throw failure("config", `\`${key}\` must be a text`);
      }
      wanted[key] = value;
    }
    settings = wanted;
  },

  format(rows) {
    return rows.map((row) => prompt(JSON.parse(row)));
  },

  parse(completions) {
    return completions.map(parsed);
  },
};

function prompt(row) {
  const { column, instruction } = settings;
  const question = Object.hasOwn(row, column) ? row[column] : null;
  if (typeof question !== "string") {
    throw failure("input", `row has no text in column \`${column}\``);
  }
  const content = instruction === "" ? question : `${question}\n\n${instruction}`;
  return { body: { tag: "messages", val: [{ role: "user", content }] }, stop: [] };
}

function parsed(completion) {
  const at = completion.lastIndexOf(MARK);
  if (at < 0) {
    return { reasoning: filled(completion), answer: undefined };
  }
  const answer = filled(completion.slice(at + MARK.length));
  return { reasoning: filled(completion.slice(0, at)), answer };
}

/** The text without blanks around it; nothing if nothing is left. */
function filled(text) {
  const trimmed = text.replace(/^[ \t\r\n]+|[ \t\r\n]+$/g, "");
  return trimmed === "" ? undefined : trimmed;
}
