#!/bin/sh
# Stands before rustc for the crates of the workspace (RUSTC_WORKSPACE_WRAPPER): libFuzzer's coverage in our code and not in
# its dependencies, which then are those of every other build. The flags are those of cargo-fuzz without a sanitizer.
case " $* " in
*" build_script_build "*) exec "$@" ;;
esac
exec "$@" --cfg fuzzing -Cdebug-assertions -Coverflow-checks -Cpasses=sancov-module \
	-Cllvm-args=-sanitizer-coverage-level=4 \
	-Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
	-Cllvm-args=-sanitizer-coverage-pc-table \
	-Cllvm-args=-sanitizer-coverage-trace-compares
