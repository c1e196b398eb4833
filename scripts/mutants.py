#!/usr/bin/env python3
"""Mutates the kernels one line at a time, and asks the tests in the simulator whether they notice.

    scripts/mutants.py                       a sample of all mutants; writes the table, and prints the share that was caught.
                                             Rows of the table whose line the kernels still have are kept: a run that was cut
                                             short goes on
    scripts/mutants.py --survivors           only those that the table says survived, after tests or kernels have changed

Linux, g++, objdump and cargo; CARGO_TARGET_DIR as usual. Each mutant is one changed line of kernels/: the file, or for a header the
files that include it, is compiled as tests/simt/build.rs does but without debug information and with -O1, and linked in place of the
original by the linker command of `cargo test --test cuda`. Which tests launch which file's kernels is measured first, with the time
that they take. Of these the cheapest runs first, and the first that fails ends it: in one random schedule, and then in as many as in
CI. A mutant that does not compile, or whose machine code is that of the original, does not count. The reasons in the table's last
column are written by hand, and kept.
"""

import argparse
import collections
import csv
import os
import pathlib
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs/results/epyc-2026-11-28/mutants.tsv"
COLUMNS = ["file", "line", "kind", "original", "mutant", "result", "by", "why"]
# Files whose tests' machine code a mutant in a header may meet, cheapest first: a fact about cost, not about headers.
INCLUDERS = 4
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-w", "-x", "c++"]

# ---- mutants

# Of what is dropped: the name of the function that is called says which kind it is.
SYNC = {
    "barrier": r"__syncthreads|__syncwarp|named_barrier|cluster_barrier|meet|barrier_\w+|release|meet_\w+",
    "fence": r"fence_\w+|wgmma_fence|keep|__threadfence",
    "wait": r"commit_\w+|wgmma_commit|wait_for_\w+|wgmma_wait",
}
CALL = re.compile(r"^\s*(?:[\w.]+::|[\w.]+\.)*(?:template )?(\w+)(?:<[^;]*>)?\(.*\);$")
ASSIGN = re.compile(r"^\s*(?:\*?[\w.\[\]]+(?:\([^;=]*\))?[\w.\[\]+* /%]*) (?:[+*/^|-]|<<|>>)?= .*;$")
DECLARATION = re.compile(r"^\s*(static )?(const|constexpr|auto|u32|u64|float|bool|int|unsigned|T|bf16|f16)\b.* = ")
SIMPLE = r"[A-Za-z_][\w.]*(?:\[[^\[\]]*\])?"
# kind, pattern, replacements. Code is formatted: operators have spaces around them, and templates have none.
RULES = [
    ("wait", r"((?:wait_for_copies|wait_for_store_reads|wgmma_wait)<)([^>]*)(>)", [r"\1\2 + 1\3"]),
    ("parity", r"\bparity \^ 1u", ["parity"]),
    ("parity", r"\b(\w+\.parity)\b(?! \^)", [r"\1 ^ 1u"]),
    ("parity", r"\bparity \^= 1u", ["parity ^= 0u"]),
    ("parity", r"\bparity = ([01])\b", [r"parity = 1 - \1"]),
    ("bytes", r"(barrier_arrive_and_expect\(.*, )([^,]+)(\);)", [r"\1\2 - 16\3", r"\1\2 + 16\3"]),
    ("bytes", r"(barrier_init\(.*, )([^,]+)(\);)", [r"\1\2 + 1\3", r"\1\2 - 1\3"]),
    ("bytes", r"\bsizeof\((\w+)\)(?! ==)", [r"2 * sizeof(\1)"]),
    ("bound", r"(?<!template) < ", [" <= "]),
    ("bound", r" <= ", [" < "]),
    ("bound", r" > ", [" >= "]),
    ("bound", r" >= ", [" > "]),
    ("bound", r"\bfmaxf\(", ["fminf("]),
    ("bound", r"\bmin\(([^(),]+), ([^(),]+)\)", [r"(\1)", r"(\2)"]),
    ("condition", r" == ", [" != "]),
    ("condition", r" != ", [" == "]),
    ("condition", r" && ", [" || "]),
    ("condition", r" \|\| ", [" && "]),
    ("condition", r"\bif \((?!constexpr)(.*)\) \{", ["if (true) {", "if (false) {"]),
    ("condition", r" \? ([^:?]+) : ([^:?;,]+?)([;,)])", [r" ? \2 : \1\3"]),
    ("condition", r"\btrue\b", ["false"]),
    ("condition", r"\bfalse\b", ["true"]),
    ("index", r"(?<![\w.#])(\d+)(u?)(?![\w.])", [lambda m: f"{int(m[1]) + 1}{m[2]}"]),
    ("operator", r" \+ ", [" - "]),
    ("operator", r" - ", [" + "]),
    ("operator", r" \* (?![)>])", [" + "]),
    ("operator", r" / ", [" * "]),
    ("operator", r" % ", [" / "]),
    ("operator", r" \^ ", [" + "]),
    ("operator", r" (>>|<<) ", [lambda m: " << " if m[1] == ">>" else " >> "]),
    ("accumulate", r" \+= ", [" = ", " -= "]),
    ("accumulate", r"(?<=\w) = (?=[^;]*;$)", [" += "]),
    ("term", rf" [+-] ({SIMPLE}|\d+u?)(?![\w(<.\[])", [""]),
    ("term", rf"(?<=[(= ])({SIMPLE}|\d+u?) [+-] ", [""]),
    ("factor", rf" \* ({SIMPLE}|\d+u?)(?![\w(<.\[])", [""]),
    ("factor", rf"(?<=[(= ])({SIMPLE}|\d+u?) \* ", [""]),
    ("swap", rf"\((?!p, ?)({SIMPLE}), ({SIMPLE})(?=[,)])", [r"(\2, \1"]),
    ("swap", rf", (?!p, ?)({SIMPLE}), ({SIMPLE})(?=[,)])", [r", \2, \1"]),
    ("swap", rf"({SIMPLE}) - ({SIMPLE})(?![\w(<.\[])", [r"\2 - \1"]),
    ("name", r"\brow\b", ["column"]),
    ("name", r"\bcolumn\b", ["row"]),
    ("name", r"\b(\w+)\.rows\b", [r"\1.columns"]),
    ("name", r"\b(\w+)\.columns\b", [r"\1.rows"]),
    ("name", r"\b(sample|token|branch|group|channel)\b(?=[,)])", ["0u"]),
    ("name", r"\bx\b(?= [+*%/])", ["y"]),
]
KINDS = list(dict.fromkeys([*SYNC, *(rule[0] for rule in RULES), "statement"]))


def code_of(line):
    """The line without its comment."""
    return re.sub(r"\s*//.*", "", line.rstrip("\n"))


def mutants_of(line):
    """Every (kind, mutated line)."""
    code = code_of(line)
    if not code.strip() or re.match(r"\s*(#|static_assert|using |template <|PACE_\w*KERNEL|namespace)", code):
        return
    indent = code[: len(code) - len(code.lstrip())]
    call = CALL.match(code)
    if call and not re.match(r"\s*(return|else)\b", code):
        kind = next((kind for kind, names in SYNC.items() if re.fullmatch(names, call[1])), "statement")
        yield kind, indent + ";"
    elif ASSIGN.match(code) and not DECLARATION.match(code):
        yield "statement", indent + ";"
    for kind, pattern, replacements in RULES:
        if kind == "accumulate" and DECLARATION.match(code):
            continue
        for match in re.finditer(pattern, code):
            for replacement in replacements:
                text = replacement(match) if callable(replacement) else match.expand(replacement)
                mutated = code[: match.start()] + text + code[match.end() :]
                if mutated != code:
                    yield kind, mutated


Mutant = collections.namedtuple("Mutant", "file line kind original mutated")


def sample(compiled, count, rng):
    """`count` mutants: for each file a share that grows with the root of its lines, of as many kinds as there are."""
    candidates = {}
    for file, lines in compiled.items():
        by_kind = collections.defaultdict(list)
        for number, line in enumerate((ROOT / "kernels" / file).read_text().splitlines(), 1):
            if number in lines:
                for kind, mutated in mutants_of(line):
                    by_kind[kind].append(Mutant(file, number, kind, code_of(line), mutated))
        if by_kind:
            candidates[file] = by_kind
    weight = {file: sum(map(len, kinds.values())) ** 0.5 for file, kinds in candidates.items()}
    chosen = []
    for file, kinds in sorted(candidates.items()):
        queues = []
        for kind in sorted(kinds, key=KINDS.index):
            queue = list(dict.fromkeys(kinds[kind]))
            rng.shuffle(queue)
            queues.append(queue)
        share = max(4, round(count * weight[file] / sum(weight.values())))
        while share > 0 and any(queues):
            for queue in queues:
                if queue and share > 0:
                    chosen.append(queue.pop())
                    share -= 1
    # All files early: a run that is cut short has seen something of each.
    rng.shuffle(chosen)
    return chosen


# ---- the test program


def limits(cpu_seconds):
    def apply():
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    return apply


class Bench:
    """A copy of the kernels to change, their objects, and the linker's command."""

    def __init__(self, work):
        self.work = work
        self.kernels = work / "kernels"
        shutil.rmtree(self.kernels, ignore_errors=True)
        shutil.copytree(ROOT / "kernels", self.kernels)
        self.sources = sorted(str(path.relative_to(self.kernels)) for path in self.kernels.rglob("*.cu"))
        self.link_command = self.keep(self.rustc_link_command())
        self.code = {source: self.machine_code(self.compile(source)) for source in self.sources}

    @staticmethod
    def rustc_link_command():
        # A crate that is up to date would print nothing.
        os.utime(ROOT / "tests/cuda/main.rs")
        command = "cargo rustc --quiet --test cuda -- --print link-args -C save-temps"
        out = subprocess.run(shlex.split(command), cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
        line = next(line for line in out.splitlines() if "-o" in line and "cuda-" in line)
        words = shlex.split(line)
        first = next(i for i, word in enumerate(words) if not re.match(r"\w+=", word))
        return words[first:]

    def keep(self, command):
        """The command with copies of what it links: other builds go on meanwhile."""
        folder = self.work / "linked"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        words = []
        for word in command:
            if word.endswith((".o", ".rlib")):
                shutil.copy(word, folder)
                word = str(folder / os.path.basename(word))
            words.append(word)
        return words

    def object(self, source):
        return self.work / (source.replace("/", "_") + ".o")

    def compile_command(self, source):
        simt = ROOT / "tests/simt/include"
        return ["g++", *FLAGS, "-include", simt / "simt.h", "-I", simt, "-I", self.kernels, self.kernels / source]

    def compile(self, source):
        """The object, or None if it does not compile."""
        command = [*self.compile_command(source), "-c", "-o", self.object(source)]
        done = subprocess.run(command, preexec_fn=limits(300), stderr=subprocess.DEVNULL)
        return self.object(source) if done.returncode == 0 else None

    def machine_code(self, path):
        """Code and data without names, which hold the lengths of what moved."""
        return subprocess.run(["objdump", "-s", path], stdout=subprocess.PIPE, check=True).stdout

    def compiled_lines(self):
        """By file of kernels/, lines that the simulator compiles and the sources that they are compiled for."""
        lines = collections.defaultdict(lambda: collections.defaultdict(set))
        for source in self.sources:
            out = subprocess.run([*self.compile_command(source), "-E"], stdout=subprocess.PIPE, check=True, text=True)
            file, number = None, 0
            for line in out.stdout.splitlines():
                marker = re.match(r'# (\d+) "(.*?)"', line)
                if marker:
                    number = int(marker[1])
                    path = os.path.normpath(marker[2])
                    inside = path.startswith(str(self.kernels) + "/")
                    file = os.path.relpath(path, self.kernels) if inside else None
                else:
                    if file and line.strip():
                        lines[file][number].add(source)
                    number += 1
        lines.pop("params.h", None)  # generated
        return lines

    def link(self, objects, name, *more):
        program = self.work / name
        command = list(self.link_command)
        command[command.index("-o") + 1] = program
        # In front of the archives: members that define nothing new are not taken.
        command[1:1] = objects
        subprocess.run([*command, *more], check=True, stderr=subprocess.DEVNULL, preexec_fn=limits(300))
        return program

    def measure(self):
        """By source, the tests that launch its kernels and their CPU seconds, cheapest first. All must pass."""
        kernels = {}
        for source in self.sources:
            names = subprocess.run(["nm", self.object(source)], stdout=subprocess.PIPE, check=True, text=True).stdout
            for name in re.findall(r" T pace_simt_run_(\w+)", names):
                kernels[name] = source
        # Each launch leaves the name of its source.
        spy = self.work / "spy.c"
        spy.write_text(
            "#include <stdio.h>\n#include <stdlib.h>\n"
            "static void note(const char *s) { FILE *f = fopen(getenv(\"MUTANTS_LOG\"), \"a\"); fputs(s, f); fclose(f); }\n"
            + "".join(
                f"void __real_pace_simt_run_{name}(const void *p);\n"
                f"void __wrap_pace_simt_run_{name}(const void *p) {{ static int seen; "
                f"if (!seen) {{ seen = 1; note(\"{source}\\n\"); }} __real_pace_simt_run_{name}(p); }}\n"
                for name, source in kernels.items()
            )
        )
        spy_object = spy.with_suffix(".o")
        subprocess.run(["gcc", "-O1", "-fPIC", "-c", spy, "-o", spy_object], check=True)
        wraps = [f"-Wl,--wrap=pace_simt_run_{name}" for name in kernels]
        program = self.link([spy_object, *map(self.object, self.sources)], "measured", *wraps)
        listed = subprocess.run([program, "--list"], stdout=subprocess.PIPE, check=True, text=True).stdout
        log = self.work / "log"
        self.tests = collections.defaultdict(list)
        for test in re.findall(r"^(simt::\S+): test", listed, re.M):
            log.write_text("")
            passed, how, seconds = self.run(program, test, 600, MUTANTS_LOG=str(log))
            if not passed:
                raise SystemExit(f"{test} fails without a mutant: {how}")
            for source in set(log.read_text().split()):
                self.tests[source].append((seconds, test))
        for source in self.sources:
            self.tests[source].sort()
            seconds = sum(seconds for seconds, _ in self.tests[source])
            print(f"{source}: {len(self.tests[source])} tests, {seconds:.1f} s", flush=True)

    def run(self, program, test, cpu_seconds, **env):
        """Whether the test passed, how it ended, and its CPU seconds."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        env = {**os.environ, "RAYON_NUM_THREADS": "1", "RUST_BACKTRACE": "0", **env}
        command = [program, "--exact", test, "--test-threads", "1"]
        try:
            done = subprocess.run(
                command, env=env, cwd=ROOT, timeout=20 * cpu_seconds, preexec_fn=limits(cpu_seconds),
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            )
            code = done.returncode
            how = "assertion" if code > 0 else signal.Signals(-code).name if code < 0 else "passed"
            # What the simulator has to say, rather than what the assertion of the test has.
            how = "fault" if re.search(r"panicked[^\n]*simulate\.rs", done.stdout) else how
        except subprocess.TimeoutExpired:
            code, how = -1, "timeout"
        how = {"SIGXCPU": "timeout", "SIGKILL": "timeout"}.get(how, how)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return code == 0, how, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def judge(self, mutant, includers):
        """(result, by): caught by a test, survived, or of no account."""
        path = self.kernels / mutant.file
        original = path.read_text()
        lines = original.splitlines()
        lines[mutant.line - 1] = mutant.mutated
        path.write_text("\n".join(lines) + "\n")
        met, compiled = 0, False
        by_cost = sorted(includers, key=lambda source: (sum(test[0] for test in self.tests[source]), source))
        try:
            for source in by_cost:
                if met == INCLUDERS:
                    break
                if not self.compile(source):
                    continue
                compiled = True
                if self.machine_code(self.object(source)) == self.code[source]:
                    continue
                met += 1
                program = self.link([self.object(source)], "mutant")
                # One random schedule of each case finds most, in a fraction of the time.
                for more in ({"PACE_SCHEDULES": "1"}, {}):
                    for seconds, test in self.tests[source]:
                        passed, how, _ = self.run(program, test, int(5 * seconds) + 5, **more)
                        if not passed:
                            return "caught", f"{test} ({how})"
        finally:
            path.write_text(original)
        if met > 0:
            return "survived", ""
        return ("same code", "") if compiled else ("does not compile", "")


# ---- the table


def read_table():
    if not TABLE.exists():
        return []
    with TABLE.open() as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def write_table(rows):
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    rows.sort(key=lambda row: (row["file"], int(row["line"]), row["kind"], row["mutant"]))
    part = TABLE.with_suffix(".part")
    with part.open("w") as file:
        file.write("\t".join(COLUMNS) + "\n")
        file.writelines("\t".join(str(row[column]) for column in COLUMNS) + "\n" for row in rows)
    part.replace(TABLE)


def row_of(mutant, result, by, why):
    texts = mutant.original.strip(), mutant.mutated.strip()
    return dict(zip(COLUMNS, (mutant.file, mutant.line, mutant.kind, *texts, result, by, why)))


def still_there(rows):
    """(row, mutant) of the table, where the kernels still have the line, and it is clear which one it is."""
    for row in rows:
        path = ROOT / "kernels" / row["file"]
        lines = path.read_text().splitlines() if path.exists() else []
        at = [i for i, line in enumerate(lines, 1) if code_of(line).strip() == row["original"]]
        line = at[0] if len(at) == 1 else int(row["line"])
        if line in at:
            yield {**row, "line": line}, Mutant(row["file"], line, row["kind"], code_of(lines[line - 1]), row["mutant"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=220, help="rows that the table is to have; twice as many mutants are made")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--survivors", action="store_true", help="only what survived by the table")
    arguments = parser.parse_args()
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    bench = Bench(target / "mutants")
    bench.measure()
    compiled = bench.compiled_lines()
    old = list(still_there(read_table()))
    key = lambda row: (row["file"], row["original"], row["mutant"])
    # One that is judged again keeps its old row until then.
    rows = {key(row): row for row, _ in old}
    if arguments.survivors:
        chosen = [mutant for row, mutant in old if row["result"] == "survived"]
    else:
        chosen = sample(compiled, 2 * arguments.count, random.Random(arguments.seed))
        chosen = [mutant for mutant in chosen if key(row_of(mutant, "", "", "")) not in rows]
    start = time.monotonic()
    for number, mutant in enumerate(chosen, 1):
        if not arguments.survivors and len(rows) >= arguments.count:
            break
        result, by = bench.judge(mutant, compiled[mutant.file][mutant.line])
        seconds = time.monotonic() - start
        print(f"{number}/{len(chosen)} {seconds:.0f} s {mutant.file}:{mutant.line} {mutant.kind}: {result} {by}", flush=True)
        row = row_of(mutant, result, by, "")
        before = rows.pop(key(row), None)
        if result in ("caught", "survived"):
            why = before["why"] if before and result == "survived" else ""
            rows[key(row)] = {**row, "why": why}
        write_table(list(rows.values()))
    caught = sum(row["result"] == "caught" for row in rows.values())
    print(f"{caught} of {len(rows)} mutants caught, {len(rows) - caught} survived")


if __name__ == "__main__":
    main()
