//! The world `reward` of grpo:plugin@0.1.0: records as the canonical ABI lays them out in wasm32, and the
//! memory that they live in. `plugin.zig` has `configure` and `score`.

const std = @import("std");
const plugin = @import("plugin.zig");

/// Text or other items that somebody else owns.
pub fn List(comptime T: type) type {
    return extern struct {
        ptr: [*]const T,
        len: usize,

        pub fn of(items: []const T) @This() {
            return .{ .ptr = items.ptr, .len = items.len };
        }

        pub fn slice(self: @This()) []const T {
            return self.ptr[0..self.len];
        }
    };
}

pub const String = List(u8);

pub const OptionString = extern struct {
    is_some: u8,
    value: String,

    pub fn get(self: @This()) ?[]const u8 {
        return if (self.is_some == 1) self.value.slice() else null;
    }
};

/// Times in milliseconds; wit/types.wit says what each is.
pub const Telemetry = extern struct {
    latency_ms: f64,
    queue_ms: f64,
    prefill_ms: f64,
    decode_ms: f64,
    prompt_tokens: u32,
    cached_prompt_tokens: u32,
    generated_tokens: u32,
    draft_tokens: u32,
    accepted_tokens: u32,
    kv_bytes: u64,
};

pub const Question = extern struct { row: String, prompt: String };

pub const Finish = enum(u8) { stop, length, abort };

pub const Sample = extern struct {
    question: u32,
    completion: String,
    reasoning: OptionString,
    answer: OptionString,
    finish: Finish,
};

pub const Part = extern struct { name: String, value: f64 };

pub const Scored = extern struct { total: f64, parts: List(Part) };

pub const Verdict = extern struct {
    tag: enum(u8) { value, skip },
    of: extern union { value: Scored, skip: String },

    pub fn value(total: f64, parts: []const Part) Verdict {
        return .{ .tag = .value, .of = .{ .value = .{ .total = total, .parts = .of(parts) } } };
    }

    pub fn skip(reason: []const u8) Verdict {
        return .{ .tag = .skip, .of = .{ .skip = .of(reason) } };
    }
};

comptime {
    std.debug.assert(@sizeOf(Sample) == 40 and @sizeOf(Telemetry) == 64);
    std.debug.assert(@sizeOf(Verdict) == 24 and @sizeOf(Part) == 16 and @sizeOf(Result) == 16);
}

/// What went wrong, as `plugin-error` of the WIT.
pub const Failure = extern struct {
    tag: enum(u8) { config, input, internal },
    message: String,

    /// Fills in why, for `return failure.config("…", .{})`.
    pub fn config(self: *Failure, comptime format: []const u8, args: anytype) error{Failed} {
        return self.set(.config, format, args);
    }

    pub fn input(self: *Failure, comptime format: []const u8, args: anytype) error{Failed} {
        return self.set(.input, format, args);
    }

    fn set(self: *Failure, tag: @FieldType(Failure, "tag"), comptime format: []const u8, args: anytype) error{Failed} {
        const message = std.fmt.allocPrint(memory.allocator(), format, args) catch "out of memory";
        self.* = .{ .tag = tag, .message = .of(message) };
        return error.Failed;
    }
};

/// Everything of a call; freed at its end.
pub var memory = std.heap.ArenaAllocator.init(std.heap.wasm_allocator);

extern "grpo:plugin/host@0.1.0" fn @"log"(level: u32, text: [*]const u8, len: usize) void;

/// Writes a line to the run's log.
pub fn line(level: enum(u32) { debug, info, warn, err }, text: []const u8) void {
    @"log"(@intFromEnum(level), text.ptr, text.len);
}

extern "grpo:plugin/host@0.1.0" fn @"sample-telemetry"(list: *List(Telemetry)) void;

/// What the samples of the running `score` cost, in their order.
pub fn sampleTelemetry() []const Telemetry {
    var list: List(Telemetry) = undefined;
    @"sample-telemetry"(&list);
    return list.slice();
}

const Result = extern struct {
    is_error: u8,
    of: extern union { ok: List(Verdict), failure: Failure },
};
var returned: Result = undefined;

fn finish(verdicts: []const Verdict, failure: ?Failure) *const Result {
    returned = if (failure) |why|
        .{ .is_error = 1, .of = .{ .failure = why } }
    else
        .{ .is_error = 0, .of = .{ .ok = .of(verdicts) } };
    return &returned;
}

/// An error of Zig's own, such as `OutOfMemory`, is `internal`.
fn whatever(failed: anyerror, failure: *Failure) Failure {
    if (failed != error.Failed) {
        failure.* = .{ .tag = .internal, .message = .of(@errorName(failed)) };
    }
    return failure.*;
}

fn configure(ptr: [*]const u8, len: usize) callconv(.c) *const Result {
    var failure: Failure = undefined;
    plugin.configure(ptr[0..len], &failure) catch |failed| return finish(&.{}, whatever(failed, &failure));
    return finish(&.{}, null);
}

fn score(questions: [*]const Question, questions_len: usize, samples: [*]const Sample, samples_len: usize) callconv(.c) *const Result {
    var failure: Failure = undefined;
    const verdicts = plugin.score(questions[0..questions_len], samples[0..samples_len], &failure) catch |failed|
        return finish(&.{}, whatever(failed, &failure));
    return finish(verdicts, null);
}

fn release(_: *const Result) callconv(.c) void {
    _ = memory.reset(.retain_capacity);
}

fn realloc(old: [*]u8, old_size: usize, alignment: usize, size: usize) callconv(.c) [*]u8 {
    std.debug.assert(alignment <= 8);
    // Nothing at all would be put beyond the memory, where the host does not let it stand.
    const at = memory.allocator().alignedAlloc(u8, .@"8", @max(size, 1)) catch @trap();
    const kept = @min(old_size, size);
    @memcpy(at[0..kept], old[0..kept]);
    return at.ptr;
}

comptime {
    const scoring = "grpo:plugin/scoring@0.1.0#";
    @export(&configure, .{ .name = scoring ++ "configure" });
    @export(&score, .{ .name = scoring ++ "score" });
    @export(&release, .{ .name = "cabi_post_" ++ scoring ++ "configure" });
    @export(&release, .{ .name = "cabi_post_" ++ scoring ++ "score" });
    @export(&realloc, .{ .name = "cabi_realloc" });
}
