"""How many small faults in a module do its tests notice?

    python tests/mutate.py [MODULE ...] [--count N] [--seed S] [--timeout SECONDS]

Draws N mutants of each module (0: takes all), each with one small fault: another comparison, an
argument less, a constant a little off. For each, a process is forked from one that has already
imported torch and what else the tests import; it runs the module's test files and the cells of its
notebook on a copy of the package that holds the fault. Mutants that no test notices are listed with
file, line and what was changed. The working tree is never touched."""
import argparse
import ast
import compileall
import difflib
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

root = Path(__file__).parent.parent

# What pytest is asked to run for each module, the quickest first; the cells of its notebook come
# after that.
RECALL = ['test_metrics.py', 'test_strict_metrics.py']
STEPS = ['test_steps.py::test_ten_steps_are_those_of_a_plain_loop',
         'test_steps.py::test_a_run_that_is_resumed_within_an_epoch_takes_the_same_steps',
         'test_steps.py::test_a_step_that_is_left_out_leaves_nothing_behind',
         'test_steps.py::test_which_steps_can_be_taken',
         'test_steps.py::test_defaults_of_schedule_and_average',
         'test_steps.py::test_rates_of_the_released_groups',
         'test_devices.py::test_replay_draws_as_the_process_did']
TESTS = {
    'fields': ['test_fields.py'],
    'losses': ['test_losses.py'],
    'decode': ['test_decode.py'],
    'matching': RECALL,
    'metrics': RECALL,
    'training.settings': ['test_configs.py'],
    'training.step': STEPS,
    'training.resume': STEPS[1:2],
    'training.loop': [*STEPS, 'test_steps.py::test_only_the_same_network_and_teacher_go_on',
                      'test_steps.py::test_what_is_not_there_is_said',
                      'test_stages.py::test_every_stage_is_checked_first'],
    'evaluation.core': ['test_evaluation.py', 'test_devices.py::test_a_shard_that_is_not_there'],
    'evaluation.thresholds': ['test_evaluation.py'],
    'evaluation.intervals': ['test_strict_metrics.py'],
    'evaluation.diagnostics': ['test_evaluation.py'],
}
WITHOUT = ('not (cover_the_truth or memory or runbook or released_depth or help_reaches or trial or '
           'stops_before or student_without)')  # take long, and show other things

# Lines where a fault may survive: module, how the line begins, how it reads with the fault ('' for
# any), and why no test can tell the two apart. They are run, and reported apart if they survive.
EQUIVALENT = [
    ('fields', 'shifted = ', '', 'the third of the three radii is always the smallest'),
    ('fields', 'inside = ', '', 'the third of the three radii is always the smallest'),
    ('decode', 'boxes, scores = zip(*[(b.new_full((1, 4), torch.inf)', '',
     'padding is infinitely far away, however much there is'),
    ('matching', 'if not len(pairs): predicates = np.zeros((0', 'if not len(pairs): predicates = np.zeros((1',
     'a row of zeros without a pair claims nothing'),
    ('matching', 'predicates = np.zeros((len(pairs), predicates.shape[1])', 'predicates = np.ones',
     'the only pair there is comes first, whatever its scores'),
    ('metrics', 'return np.unique(np.append(row_key(triplets.reshape(-1, 3)),',
     'return np.unique(np.append(row_key(triplets.reshape(-2, 3)),',
     'to numpy any negative number is the one that follows'),
    ('matching', 'return rows.astype(np.int64) @ (1 << 20)', 'return rows.astype(np.int64) @ (2 << 20)',
     'a larger base fits into 64 bits, too'),
    ('matching', 'place = np.zeros(len(objects.boxes), int)', 'place = np.ones',
     'only places of objects in use are looked up'),
    ('matching', 'if len(values) <= TOP[-1]', 'if (len(values) < TOP[-1])',
     'of exactly a hundred all are among the best hundred'),
    ('metrics', "found = np.zeros((2 + (self.task != 'sgdet'), 3, 0))", 'found = np.ones',
     'of no relation there is neither a zero nor a one'),
    ('metrics', 'best = (values == np.where(np.isnan(values), -1', 'best = (values == np.where(np.isnan(values), -0',
     'no figure is negative, and NaN equals nothing'),
    ('training.loop', "if place.type == 'cuda': times['memory']", '', 'only a GPU has this memory'),
    ('training.loop', 'mininterval=2', '', 'how often the bar is drawn'),
]

COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
               ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
               ast.In: ast.NotIn, ast.NotIn: ast.In}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
             ast.FloorDiv: ast.Mult, ast.Mod: ast.Add, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr,
             ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And}
NAMES = ['min max', 'minimum maximum', 'argmin argmax', 'amin amax', 'floor ceil', 'any all',
         'zeros ones', 'zeros_like ones_like', 'new_zeros new_ones', 'sum mean', 'append extend',
         'get_world_size get_rank', 'nansum sum', 'nanmean mean', 'removeprefix removesuffix']
NAMES = {a: b for pair in map(str.split, NAMES) for a, b in (pair, pair[::-1])}
SYMMETRIC = {'min', 'max', 'minimum', 'maximum', 'outer', 'isclose'}  # arguments may be swapped
# What a processor cannot tell, which sorts in order whether it is asked to or not
UNSEEN = {'device', 'stable', 'non_blocking', 'pin_memory', 'stacklevel', 'disable', 'desc'}


def is_text(node):
    return isinstance(node, ast.JoinedStr) or isinstance(getattr(node, 'value', None), str)


def other_constants(value):
    if isinstance(value, bool): return [not value]
    if isinstance(value, int): return [value + 1, value - 1] if value else [1]
    return [value * .9 or .1] if isinstance(value, float) else []


def other_calls(node):
    args, keywords = node.args, node.keywords
    plain = not any(isinstance(a, ast.Starred) for a in args[:2])
    if len(args) > 1 and plain and ast.unparse(node.func).rpartition('.')[2] not in SYMMETRIC:
        yield ast.Call(node.func, [args[1], args[0], *args[2:]], keywords)
    for i, keyword in enumerate(keywords):
        if keyword.arg and keyword.arg not in UNSEEN: yield ast.Call(node.func, args, keywords[:i] + keywords[i + 1:])
    if isinstance(node.func, ast.Attribute) and node.func.attr in NAMES:
        yield ast.Call(ast.Attribute(node.func.value, NAMES[node.func.attr]), args, keywords)
    if isinstance(node.func, ast.Name) and node.func.id in NAMES:
        yield ast.Call(ast.Name(NAMES[node.func.id]), args, keywords)


def other_expressions(node):
    "What may stand in place of an expression."
    kind = type(node)
    if kind is ast.Constant: yield from map(ast.Constant, other_constants(node.value))
    if kind is ast.Compare:
        for i, op in enumerate(node.ops):
            ops = [*node.ops[:i], COMPARISONS[type(op)](), *node.ops[i + 1:]]
            yield ast.Compare(node.left, ops, node.comparators)
    if kind is ast.BinOp and type(node.op) in OPERATORS:
        if not is_text(node.left) and not is_text(node.right):
            yield ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
    if kind is ast.BoolOp: yield ast.BoolOp(OPERATORS[type(node.op)](), node.values)
    if kind is ast.UnaryOp and not isinstance(node.operand, ast.Constant): yield node.operand
    if kind is ast.IfExp: yield ast.IfExp(node.test, node.orelse, node.body)
    if kind is ast.Call: yield from other_calls(node)
    if kind is ast.Slice:
        for part in ('lower', 'upper', 'step'):
            if getattr(node, part): yield ast.Slice(**{**vars_of_slice(node), part: None})


def vars_of_slice(node): return dict(lower=node.lower, upper=node.upper, step=node.step)


def other_statements(node):
    "What may stand in place of a statement; of a compound one, in place of its condition."
    kind = type(node)
    if kind in (ast.If, ast.While) or kind is ast.comprehension:
        for test in node.ifs if kind is ast.comprehension else [node.test]:
            if not isinstance(test, ast.Constant): yield test, ast.UnaryOp(ast.Not(), test)
    if kind is ast.Return and node.value and not is_none(node.value):
        yield node, ast.Return(ast.Constant(None))
    called = kind is ast.Expr and isinstance(node.value, ast.Call)
    if called or kind in (ast.Raise, ast.Continue, ast.Break): yield node, ast.Pass()
    if kind is ast.AugAssign:
        yield node, ast.Pass()
        if type(node.op) in OPERATORS:
            yield node, ast.AugAssign(node.target, OPERATORS[type(node.op)](), node.value)
    if kind is ast.Assign and not isinstance(node.targets[0], (ast.Name, ast.Tuple)):
        yield node, ast.Pass()


def is_none(node): return isinstance(node, ast.Constant) and node.value is None


def left_alone(parent, field, node):
    """Texts, messages, annotations, imports, decorators and __all__ are not mutated, nor functions
    that draw: what a figure looks like is looked at, and tests ask for what it shows."""
    if isinstance(node, ast.FunctionDef) and node.name.startswith('plot_'): return True
    if isinstance(node, (ast.JoinedStr, ast.Import, ast.ImportFrom)): return True
    if isinstance(node, ast.keyword) and node.arg in UNSEEN: return True
    if field in ('annotation', 'returns', 'decorator_list', 'exc'): return True
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == '__all__'


def changes(node):
    "Yield (what is replaced, by what) of a tree."
    yield from other_statements(node)
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or left_alone(node, field, child): continue
            if isinstance(child, (ast.expr, ast.Slice)):
                for other in other_expressions(child): yield child, other
            yield from changes(child)


def mutants(source):
    "Yield (line, source with one fault)."
    raw = source.encode()
    starts = [0]
    for line in raw.splitlines(keepends=True): starts.append(starts[-1] + len(line))
    for node, other in changes(ast.parse(source)):
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        text = ast.unparse(ast.fix_missing_locations(other))
        if isinstance(other, ast.expr) and not isinstance(other, (ast.Constant, ast.Call)):
            text = f'({text})'
        mutant = (raw[:start] + text.encode() + raw[end:]).decode()
        try: changed = ast.dump(ast.parse(mutant)) != ast.dump(ast.parse(source))
        except SyntaxError: continue
        if changed: yield node.lineno, mutant


def difference(source, mutant):
    "(lines that go, lines that come), stripped."
    lines = list(difflib.ndiff(source.splitlines(), mutant.splitlines()))
    return tuple(' '.join(line[2:].strip() for line in lines if line[0] == sign) for sign in '-+')


def run_notebook(path, module):
    """Run the cells of a notebook that are not exported, in the namespace of its module: what a
    notebook shows is a test. A cell that is exported brings back the names that it has defined."""
    space, shown = vars(module), dict(vars(module))
    space['display'] = lambda *_: None
    os.chdir(path.parent)
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] != 'code' or re.search(r'^#\| *(eval: *false|default_exp)', source): continue
        if not source.startswith('#| export'): exec(compile(source, cell['id'], 'exec'), space)
        else:
            for name in re.findall(r'^(?:def |class )?(\w+)', source, re.M):
                if name in shown: space[name] = shown[name]


def run_tests(name, copy):
    "In a forked process: the tests of a module on the `copy` of the package; returns the exit code."
    import hypothesis
    import pytest
    # the first example that fails is enough
    phases = [phase for phase in hypothesis.Phase if phase.name in ('explicit', 'generate')]
    hypothesis.settings.register_profile('mutants', phases=phases, database=None)
    hypothesis.settings.load_profile('mutants')
    sys.path[:0] = [str(copy), str(root/'tests')]
    os.environ |= dict(PYTHONPATH=str(copy), PYTHONDONTWRITEBYTECODE='1')
    files = [str(root/'tests'/file) for file in TESTS[name]]
    options = ['-x', '-q', '-k', WITHOUT, '-p', 'no:cacheprovider', '-p', 'no:xdist', '-W', 'ignore',
               '--basetemp', str(copy/'tests')]
    if pytest.main([*options, *files]): return 1
    module = importlib.import_module(f'stdg.{name}')
    assert Path(module.__file__).is_relative_to(copy), module.__file__
    notebook = re.search(r'File to edit: .*?(nbs/.*ipynb)', (copy/path_of(name)).read_text())[1]
    run_notebook(root/notebook, module)
    return 0


def path_of(name): return Path('stdg', *name.split('.')).with_suffix('.py')


def forked(name, copy, seconds):
    """Run the tests in a process of their own with so many seconds of processor time; returns
    'passed', 'failed' or 'timeout', and how many it took."""
    start = time.monotonic()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.setsid()
            with open(copy/'said.txt', 'w') as said:
                for stream in (1, 2): os.dup2(said.fileno(), stream)
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
            code = run_tests(name, copy)
            (copy/'modules.json').write_text(json.dumps(list(sys.modules)))
        except BaseException as error: print(repr(error), file=sys.stderr, flush=True)
        finally: os._exit(code)
    while not (ended := os.wait4(pid, os.WNOHANG))[0]:
        if time.monotonic() - start > 20 * seconds: os.killpg(pid, signal.SIGKILL)
        time.sleep(.01)
    try: os.killpg(pid, signal.SIGKILL)  # what the tests have started and not ended
    except ProcessLookupError: pass
    spent = ended[2].ru_utime + ended[2].ru_stime
    if os.WIFSIGNALED(ended[1]): return 'timeout', spent
    return 'passed' if ended[1] == 0 else 'failed', spent


def preload(copy):
    "Import what the tests have imported, beside the package and the tests themselves."
    for name in json.loads((copy/'modules.json').read_text()):
        if name.split('.')[0] in ('stdg', '__main__') or name.startswith('test_'): continue
        try: importlib.import_module(name)
        except Exception: pass  # some modules exist only for a while


def judge(name, count, seed, timeout):
    "Run a module's mutants, print what survives; returns numbers (killed, run)."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(root/'stdg', copy/'stdg')
        compileall.compile_dir(copy/'stdg', quiet=1)
        path, source = copy/path_of(name), (copy/path_of(name)).read_text(encoding='utf-8')
        for compiled in path.parent.glob(f'__pycache__/{path.stem}.*'): compiled.unlink()
        result, spent = forked(name, copy, 600)
        if result != 'passed':
            raise SystemExit(f"{name}: the tests fail without any fault\n{(copy/'said.txt').read_text()[-3000:]}")
        preload(copy)
        drawn, known = list(mutants(source)), [entry[1:] for entry in EQUIVALENT if entry[0] == name]
        for line, *_ in known:
            if line not in source: raise SystemExit(f'{name}: EQUIVALENT names {line!r}, which is gone')
        print(f'{name}: {len(drawn)} mutants, tests take {spent:.0f} s', flush=True)
        if count and count < len(drawn): drawn = random.Random(seed).sample(drawn, count)
        killed = alike = 0
        for number, mutant in sorted(drawn):
            path.write_text(mutant, encoding='utf-8')
            print('.', end='', file=sys.stderr, flush=True)
            if forked(name, copy, timeout or 2 * spent + 5)[0] != 'passed': killed += 1
            else:
                goes, comes = difference(source, mutant)
                why = [reason for line, fault, reason in known
                       if goes.startswith(line) and comes.startswith(fault)]
                alike += bool(why)
                said = f"equivalent ({why[0]})" if why else 'SURVIVED'
                print(f'  {said} {path_of(name)}:{number}\n    - {goes}\n    + {comes}', flush=True)
    run = len(drawn) - alike
    print(f'{name}: {killed} of {run} killed, {killed / max(run, 1):.0%}', flush=True)
    return killed, run


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('modules', nargs='*', metavar='MODULE', help=f"of {', '.join(TESTS)}; default: all")
    parser.add_argument('--count', type=int, default=40, help='mutants of each module; 0: all')
    parser.add_argument('--seed', type=int, default=0, help='of the draw')
    parser.add_argument('--timeout', type=float, help='processor seconds for the tests of a mutant')
    given = parser.parse_args()
    unknown = set(given.modules) - set(TESTS)
    if unknown: parser.error(f"no tests are named for {', '.join(sorted(unknown))}")
    sys.dont_write_bytecode = True
    counts = [judge(name, given.count, given.seed, given.timeout) for name in given.modules or TESTS]
    killed, run = map(sum, zip(*counts))
    print(f'in all: {killed} of {run} killed, {killed / max(run, 1):.0%}')


if __name__ == '__main__': main()
