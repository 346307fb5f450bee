"""Reads PTX far enough to tell which registers a kernel may read before it has written them."""

import re

REGISTER = re.compile(r"%[a-z]+\d+")
NO_RESULT = re.compile(r"(st|red|bar|barrier|membar|fence|prefetch|bra|ret|exit|trap)\b")
ENDS = re.compile(r"(bra|ret|exit|trap)\b")


def instructions(body):
    """Labels and instructions of the text of one kernel."""
    text = body[body.index("{") + 1 : body.index("\n}")]
    for line in re.split(r"[;\n]", re.sub(r"//.*", "", text)):
        line = line.strip().lstrip("{").strip()  # braces around inline assembly
        if line and line[0] not in ".}":
            yield line


def blocks(body):
    """[instructions] of each basic block, and the numbers of the blocks in front of each."""
    found, numbers = [[]], {}
    for line in instructions(body):
        if line.endswith(":"):
            found.append([])
            numbers[line[:-1]] = len(found) - 1
        else:
            found[-1].append(line)
            if re.search(r"\bbra\b", line):
                found.append([])
    before = [[] for _ in found]
    for number, block in enumerate(found):
        last = block[-1] if block else ""
        if jump := re.search(r"\bbra(?:\.uni)?\s+(\S+)", last):
            before[numbers[jump[1]]].append(number)
        if number + 1 < len(found) and not ENDS.match(last):
            before[number + 1].append(number)
    return found, before


def reads_and_writes(line):
    guard, operation = re.fullmatch(r"(?:@!?(%p\d+)\s+)?(.*)", line).groups()
    arguments = re.sub(r"^\S+\s*", "", operation)
    close = arguments.find("}") if arguments.startswith("{") else arguments.find(",")
    split = 0 if NO_RESULT.match(operation) else close if close > 0 else len(arguments)
    reads = REGISTER.findall(arguments[split:]) + [guard] * bool(guard)
    return reads, REGISTER.findall(arguments[:split])


def unwritten(body):
    """[(instruction, register)]: reads of registers that some path to them has not written."""
    found, before = blocks(body)
    steps = [[(line, *reads_and_writes(line)) for line in block] for block in found]
    written = [{register for *_, writes in block for register in writes} for block in steps]
    everything = set().union(*written)
    # What every path has written in front of a block: from everything down to what is so.
    known = [set() if number == 0 else everything for number in range(len(found))]
    settled = False
    while not settled:
        settled = True
        for number, ahead in enumerate(before[1:], 1):
            paths = [known[one] | written[one] for one in ahead]
            now = set.intersection(*paths) if paths else everything
            settled = settled and len(now) == len(known[number])
            known[number] = now
    bad = []
    for block, have in zip(steps, known, strict=True):
        have = set(have)
        for line, reads, writes in block:
            bad += [(line, register) for register in reads if register not in have]
            have.update(writes)
    return bad
