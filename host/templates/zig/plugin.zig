//! The reward: how near the last number of an answer is to the number in the row's column `answer`.

const std = @import("std");
const abi = @import("abi.zig");

/// The plugin's `config`.
const Settings = struct {
    /// Relative error that still earns 1.
    tolerance: f64 = 1e-6,
    /// What a number just outside of the tolerance would earn at an error of 0.
    partial: f64 = 0.1,
};

var settings: Settings = .{};

pub fn configure(config: []const u8, failure: *abi.Failure) !void {
    var wanted: Settings = .{};
    var members = (try parse(config)).object.iterator();
    members: while (members.next()) |member| {
        const key = member.key_ptr.*;
        inline for (comptime std.meta.fieldNames(Settings)) |name| {
            if (std.mem.eql(u8, name, key)) {
                const number = numberOf(member.value_ptr.*) orelse -1;
                if (!(number >= 0)) return failure.config("`{s}` must be a number of at least 0", .{key});
                @field(wanted, name) = number;
                continue :members;
            }
        }
        return failure.config("unknown setting `{s}`", .{key});
    }
    settings = wanted;
}

pub fn score(questions: []const abi.Question, samples: []const abi.Sample, failure: *abi.Failure) ![]const abi.Verdict {
    const memory = abi.memory.allocator();
    const golds = try memory.alloc(?f64, questions.len);
    for (questions, golds) |question, *gold| {
        const value = (try parse(question.row.slice())).object.get("answer") orelse
            return failure.input("row has no column `answer`", .{});
        gold.* = if (value == .string) lastNumber(value.string) else numberOf(value);
    }
    const verdicts = try memory.alloc(abi.Verdict, samples.len);
    for (samples, verdicts) |sample, *verdict| {
        verdict.* = if (golds[sample.question]) |gold|
            try judge(sample.answer.get() orelse sample.completion.slice(), gold)
        else
            .skip("column `answer` holds no number");
    }
    return verdicts;
}

fn judge(answer: []const u8, gold: f64) !abi.Verdict {
    const number = lastNumber(answer) orelse return .value(0, &.{});
    const off = @abs(number - gold) / @max(@abs(gold), 1);
    const total = if (off <= settings.tolerance) 1 else settings.partial / (1 + off);
    const parts = try abi.memory.allocator().alloc(abi.Part, 1);
    parts[0] = .{ .name = .of("error"), .value = @min(off, 1e9) };
    return .value(total, parts);
}

fn parse(text: []const u8) !std.json.Value {
    return std.json.parseFromSliceLeaky(std.json.Value, abi.memory.allocator(), text, .{});
}

/// A number of JSON; those that no `i64` holds come as text.
fn numberOf(value: std.json.Value) ?f64 {
    return switch (value) {
        .integer => |number| @floatFromInt(number),
        .float => |number| number,
        .number_string => |text| std.fmt.parseFloat(f64, text) catch null,
        else => null,
    };
}

/// The last decimal number of a text. Commas between its digits are ignored.
fn lastNumber(text: []const u8) ?f64 {
    const end = 1 + (std.mem.lastIndexOfAny(u8, text, "0123456789") orelse return null);
    var start = end;
    while (start > 0 and std.mem.indexOfScalar(u8, "0123456789.,", text[start - 1]) != null) start -= 1;
    const run = abi.memory.allocator().dupe(u8, text[start..end]) catch return null;
    const bare = run[0 .. run.len - std.mem.replace(u8, text[start..end], ",", "", run)];
    // Of `1.2.3` the last two pieces are a number.
    const point = std.mem.lastIndexOfScalar(u8, bare, '.') orelse 0;
    const first = if (std.mem.lastIndexOfScalar(u8, bare[0..point], '.')) |earlier| earlier + 1 else 0;
    const number = std.fmt.parseFloat(f64, bare[first..]) catch return null;
    const signed = if (start > 0 and text[start - 1] == '-') -number else number;
    return if (std.math.isFinite(signed)) signed else null;
}
