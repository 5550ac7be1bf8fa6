"""Files are written whole or not at all: whatever breaks, whoever else writes, whenever the process is killed."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from recontrol import files
from recontrol.files import check_output, interrupts_wait, read_json, remove_leftovers, write_aside, write_json

OLD, NEW = "what was there before", "what comes now"

# The module alone, without the package, so that a child starts at once.
CHILD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
"""


def start(code: str, *arguments) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-I", "-c", CHILD + code, files.__file__, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=[True, False], ids=["over an old file", "new"])
def target(tmp_path, request):
    """A file to be written, with or without one in its place."""
    path = tmp_path / "report.json"
    if request.param:
        path.write_text(OLD)
    return path


@pytest.fixture
def dead():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-I", "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def live():
    """The number of another process that runs."""
    process = subprocess.Popen([sys.executable, "-I", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    yield process.pid
    process.stdin.close()
    process.wait(timeout=30)


class TestWriteAside:
    @pytest.mark.parametrize("kind", [str, os.fspath, lambda path: path], ids=["str", "fspath", "Path"])
    def test_nothing_is_seen_before_all_is_written(self, target, kind):
        before = names(target.parent)
        with write_aside(kind(target)) as aside:
            assert aside.parent == target.parent and aside != target
            assert names(target.parent) == before
            aside.write_text(NEW)
            assert (target.read_text() == OLD) if before else not target.exists()
        assert names(target.parent) == ["report.json"] and target.read_text() == NEW

    @pytest.mark.parametrize("written", [False, True], ids=["before the first byte", "half-way"])
    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError, GeneratorExit], ids=lambda error: error.__name__)
    def test_an_exception_leaves_everything_as_it_was(self, target, error, written):
        before, raised = names(target.parent), error("cut")
        with pytest.raises(error) as caught, write_aside(target) as aside:
            if written:
                aside.write_text(NEW[:4])
            raise raised
        # The very same, without words of ours.
        assert caught.value is raised
        assert names(target.parent) == before and (not before or target.read_text() == OLD)

    @pytest.mark.parametrize(
        ("number", "kind", "words"),
        [(errno.ENOSPC, OSError, "No space left on device"), (errno.EACCES, PermissionError, "Permission denied"), (errno.EIO, OSError, "Input/output error")],
        ids=["full disk", "forbidden", "broken disk"],
    )
    @pytest.mark.parametrize("where", ["writing", "moving"])
    def test_an_error_of_the_disk_names_the_file(self, target, monkeypatch, number, kind, words, where):
        before, raised = names(target.parent), OSError(number, os.strerror(number), "another name")

        def fail(*_):
            raise raised

        if where == "moving":
            monkeypatch.setattr(files.os, "replace", fail)
        with pytest.raises(kind) as caught, write_aside(target) as aside:
            aside.write_text(NEW[:4])
            if where == "writing":
                fail()
        assert str(caught.value) == f"[Errno {number}] could not write {target}: {words}; the previous file, if any, is untouched"
        assert caught.value.errno == number and caught.value.__cause__ is raised
        assert names(target.parent) == before and (not before or target.read_text() == OLD)

    def test_an_error_without_a_number_keeps_its_words(self, target):
        with pytest.raises(OSError, match=r"could not write .*report\.json: something odd; the previous file"), write_aside(target):
            raise OSError("something odd")

    def test_an_error_while_tidying_up_hides_nothing(self, target, monkeypatch):
        """On a disk that has become read-only nothing can be removed either."""

        def fail(*_, **__):
            raise OSError(errno.EROFS, "Read-only file system")

        with pytest.raises(OSError, match=r"could not write .*report\.json: No space left on device"), write_aside(target) as aside:
            aside.write_text(NEW[:4])
            monkeypatch.setattr(type(target), "unlink", fail)
            raise OSError(errno.ENOSPC, "No space left on device")
        interrupt = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt) as caught, write_aside(target) as aside:
            aside.write_text(NEW[:4])
            raise interrupt
        assert caught.value is interrupt

    def test_a_folder_that_cannot_be_written(self, tmp_path):
        """There is none, a file is in its place, a folder is in the file's place, or the name is too long."""
        (tmp_path / "file").write_text(OLD)
        (tmp_path / "folder").mkdir()
        for path, kind, words in (
            (tmp_path / "none" / "report.json", FileNotFoundError, "No such file or directory"),
            (tmp_path / "file" / "report.json", NotADirectoryError, "Not a directory"),
            (tmp_path / "folder", IsADirectoryError, "Is a directory"),
            (tmp_path / ("x" * 255), OSError, "File name too long"),
        ):
            with pytest.raises(kind, match=f"could not write {path}: {words}; the previous file, if any, is untouched"), write_aside(path) as aside:
                aside.write_text(NEW)
        assert names(tmp_path) == ["file", "folder"] and (tmp_path / "file").read_text() == OLD

    def test_a_body_that_writes_nothing(self, target):
        before = names(target.parent)
        with pytest.raises(FileNotFoundError, match=r"could not write .*report\.json: No such file or directory"), write_aside(target):
            pass
        assert names(target.parent) == before

    def test_two_files_of_which_the_outer_fails(self, tmp_path):
        """The inner one is in place by then."""
        with pytest.raises(ValueError, match="cut"), write_aside(tmp_path / "outer") as outer:
            outer.write_text(NEW)
            with write_aside(tmp_path / "inner") as inner:
                inner.write_text(NEW)
            raise ValueError("cut")
        assert names(tmp_path) == ["inner"]

    def test_a_killed_process_leaves_the_old_file(self, target):
        before = names(target.parent)
        child = start(
            """
import time
with files.write_aside(sys.argv[2]) as aside:
    aside.write_text("half")
    print("now", flush=True)
    time.sleep(300)
""",
            target,
        )
        assert child.stdout.readline() == "now\n"
        # While it runs, what it writes is left alone.
        remove_leftovers(target.parent)
        assert len(names(target.parent)) == len(before) + 1
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=30)
        assert len(names(target.parent)) == len(before) + 1 and (not before or target.read_text() == OLD)
        remove_leftovers(target.parent)
        assert names(target.parent) == before and (not before or target.read_text() == OLD)


class TestLinksAndDevices:
    def test_the_file_that_a_link_leads_to_is_replaced(self, tmp_path):
        """Also by a chain of links, into another folder, and where there is no file yet; with its permissions."""
        (tmp_path / "there").mkdir()
        file, link, second = tmp_path / "there" / "report.json", tmp_path / "link.json", tmp_path / "second.json"
        link.symlink_to("there/report.json")
        second.symlink_to(link)
        for path, content in ((link, "1"), (second, "2"), (tmp_path / "there" / ".." / "second.json", "3")):
            with write_aside(path) as aside:
                assert aside.parent == tmp_path / "there"
                aside.write_text(content)
            assert link.is_symlink() and second.is_symlink() and file.read_text() == content and names(tmp_path / "there") == ["report.json"]
            file.chmod(0o600)
        with write_aside(link) as aside:
            aside.write_text("4")
        assert stat.S_IMODE(file.stat().st_mode) == 0o600 and not file.is_symlink()

    def test_a_link_to_a_folder_that_is_not_there(self, tmp_path):
        (tmp_path / "link").symlink_to("none/report.json")
        with pytest.raises(FileNotFoundError, match=f"could not write {tmp_path / 'link'}: No such file"), write_aside(tmp_path / "link") as aside:
            aside.write_text(NEW)
        assert (tmp_path / "link").is_symlink()

    def test_a_folder_that_is_a_link(self, tmp_path):
        (tmp_path / "there").mkdir()
        (tmp_path / "folder").symlink_to("there")
        write_json(check_output(tmp_path / "folder", folder=True) / "a.json", 1)
        assert (tmp_path / "folder").is_symlink() and names(tmp_path / "there") == ["a.json"]

    def test_a_device_is_written_to(self):
        before = os.lstat("/dev/null")
        write_json(check_output("/dev/null"), {"a": 1})
        with pytest.raises(ValueError, match="cut"), write_aside("/dev/null"):
            raise ValueError("cut")
        after = os.lstat("/dev/null")
        assert stat.S_ISCHR(after.st_mode) and after.st_ino == before.st_ino

    def test_a_pipe_is_written_to_and_once_only(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with ThreadPoolExecutor(1) as pool:
            read = pool.submit((tmp_path / "pipe").read_text)
            write_json(check_output(tmp_path / "pipe"), [1])
            assert json.loads(read.result(timeout=30)) == [1]
        assert stat.S_ISFIFO(os.lstat(tmp_path / "pipe").st_mode) and names(tmp_path) == ["pipe"]

    def test_standard_output_that_leads_to_a_file(self, tmp_path):
        """The file stays the one that the process writes to."""
        with open(tmp_path / "out", "w") as out:
            code = CHILD + "files.write_json('/dev/stdout', [1])"
            subprocess.run([sys.executable, "-I", "-c", code, files.__file__], stdout=out, check=True)
            assert os.fstat(out.fileno()).st_ino == (tmp_path / "out").stat().st_ino
        assert read_json(tmp_path / "out") == [1] and names(tmp_path) == ["out"]

    def test_a_disk_is_not_written_to(self, tmp_path, monkeypatch):
        monkeypatch.setattr(files.Path, "is_block_device", lambda path: path.name == "disk")
        for attempt in (check_output, lambda path: write_json(path, 1)):
            with pytest.raises(OSError, match=r"could not write .*disk: it is a disk"):
                attempt(tmp_path / "disk")
        assert names(tmp_path) == []


class TestCheckOutput:
    def test_what_can_be_written_leaves_nothing_but_folders(self, tmp_path, target):
        before = names(target.parent)
        assert check_output(target) == target and names(target.parent) == before
        assert check_output(str(tmp_path / "a" / "b" / "x.json")) == tmp_path / "a" / "b" / "x.json" and names(tmp_path / "a" / "b") == []
        assert check_output(tmp_path / "a" / "c", folder=True) == tmp_path / "a" / "c" and names(tmp_path / "a" / "c") == []

    def test_what_cannot(self, tmp_path):
        (tmp_path / "file").write_text(OLD)
        (tmp_path / "folder").mkdir()
        cases = [(tmp_path / "folder", False), (tmp_path / "file" / "x", False), (tmp_path / "file", True), (tmp_path / "file" / "x", True)]
        for path, folder in [*cases, (tmp_path / ("x" * 255), False), (tmp_path / ("x" * 300), False), (tmp_path / ("x" * 300), True)]:
            with pytest.raises(OSError, match=f"could not write {path}: .*; nothing was done"):
                check_output(path, folder=folder)
        assert names(tmp_path) == ["file", "folder"] and (tmp_path / "file").read_text() == OLD

    def test_a_disk_that_fills_up(self, tmp_path, monkeypatch):
        def half(path, content):
            path.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(files.Path, "write_bytes", half)
        with pytest.raises(OSError, match=r"could not write .*x: No space left on device; nothing was done"):
            check_output(tmp_path / "x")
        assert names(tmp_path) == []


class TestRemoveLeftovers:
    def test_those_of_dead_processes_go_and_those_of_live_ones_stay(self, tmp_path, dead, live):
        gone = [f".report.json.{dead}.part", f".report.json.0.{dead}.part", f".a.b.c.{dead}.part", f".report.json.{'9' * 30}.part"]
        kept = [f".report.json.{live}.part", f".report.json.3.{live}.part"]
        for name in gone + kept:
            (tmp_path / name).write_text(NEW)
        remove_leftovers(tmp_path)
        assert names(tmp_path) == sorted(kept)

    def test_other_files_stay(self, tmp_path, dead):
        """Only the names that `write_aside` gives are looked at, and only in this folder."""
        others = ["report.json", ".report.json", f"report.json.{dead}.part", f".report.json.{dead}.part.txt", ".notes.part", f".{dead}.part", ".a.12x.part"]
        (tmp_path / "folder").mkdir()
        for name in [*others, f"folder/.report.json.{dead}.part"]:
            (tmp_path / name).write_text(NEW)
        remove_leftovers(tmp_path)
        assert names(tmp_path) == sorted([*others, "folder"]) and names(tmp_path / "folder") == [f".report.json.{dead}.part"]

    def test_our_own_that_are_open_stay_and_those_of_a_process_that_had_our_number_go(self, tmp_path):
        """In a container the number is the same at each start."""
        earlier = tmp_path / f".report.json.{os.getpid()}.part"
        earlier.write_text(OLD)
        with write_aside(tmp_path / "report.json") as aside:
            aside.write_text(NEW)
            remove_leftovers(tmp_path)
            assert names(tmp_path) == [aside.name]
        assert names(tmp_path) == ["report.json"]
        aside.write_text(OLD)
        remove_leftovers(tmp_path)
        assert names(tmp_path) == ["report.json"]

    def test_a_process_of_somebody_else_is_alive(self, tmp_path, dead, monkeypatch):
        """The system tells by refusing the signal."""

        def refuse(*_):
            raise PermissionError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(files.os, "kill", refuse)
        (tmp_path / f".report.json.{dead}.part").write_text(NEW)
        remove_leftovers(tmp_path)
        assert names(tmp_path) == [f".report.json.{dead}.part"]

    def test_no_process_gets_a_signal(self, tmp_path, live):
        (tmp_path / f".report.json.{live}.part").write_text(NEW)
        remove_leftovers(tmp_path)
        os.kill(live, 0)

    def test_an_empty_folder_and_none(self, tmp_path):
        remove_leftovers(tmp_path)
        remove_leftovers(tmp_path / "none")
        assert names(tmp_path) == []


class TestConcurrentWriters:
    def test_threads_that_write_the_same_file(self, tmp_path):
        """Whoever reads finds one of the contents, whole; the last is one of them; nothing is left beside it."""
        path, workers, rounds = tmp_path / "report.json", 8, 25
        contents = {json.dumps([worker] * 5000) for worker in range(workers)}
        path.write_text(min(contents))
        barrier = threading.Barrier(workers + 1)

        def write(worker: int) -> None:
            barrier.wait(timeout=30)
            for _ in range(rounds):
                with write_aside(path) as aside, aside.open("w") as file:
                    text = json.dumps([worker] * 5000)
                    # In two goes, so that others come between.
                    file.write(text[:6000])
                    file.flush()
                    file.write(text[6000:])
                remove_leftovers(tmp_path)

        with ThreadPoolExecutor(workers) as pool:
            tasks = [pool.submit(write, worker) for worker in range(workers)]
            barrier.wait(timeout=30)
            while not all(task.done() for task in tasks):
                assert path.read_text() in contents
            for task in tasks:
                task.result()
        assert path.read_text() in contents and names(tmp_path) == ["report.json"]

    def test_processes_that_write_the_same_file(self, tmp_path):
        path = tmp_path / "report.json"
        code = """
sys.stdin.readline()
for _ in range(100):
    files.write_json(sys.argv[2], [int(sys.argv[3])] * 3000)
    files.remove_leftovers(files.Path(sys.argv[2]).parent)
"""
        arguments = [sys.executable, "-I", "-c", CHILD + code, files.__file__, str(path)]
        children = [subprocess.Popen([*arguments, str(worker)], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for worker in range(3)]
        for child in children:
            child.stdin.write("go\n")
            child.stdin.flush()
        while any(child.poll() is None for child in children):
            if path.exists():
                content = read_json(path)
                assert content in [[worker] * 3000 for worker in range(3)]
        assert [(child.communicate(timeout=30)[1], child.returncode) for child in children] == [("", 0)] * 3
        assert names(tmp_path) == ["report.json"]


CONTENT = {"name": "Füße, 体, 👣", "numbers": [1, -2.5, 1e-300, None, True], "nested": {"empty": {}, "list": []}, "long": "x" * 100_000}


class TestInterruptsWait:
    @pytest.fixture(autouse=True)
    def interruptible(self):
        """Who runs the tests in the background may have switched interrupts off."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, before)

    def test_an_interrupt_takes_effect_at_the_end(self):
        done = []
        with pytest.raises(KeyboardInterrupt), interrupts_wait():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("all of it")
        assert done == ["all of it"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_an_error_comes_first_and_the_handler_is_put_back(self):
        with pytest.raises(ValueError, match="broken"), interrupts_wait():
            raise ValueError("broken")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()

    def test_other_threads_leave_the_handler_alone(self):
        seen = []

        def work():
            with interrupts_wait():
                seen.append(signal.getsignal(signal.SIGINT))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert seen == [signal.default_int_handler]


class TestJson:
    def test_what_is_written_is_read(self, target):
        write_json(target, CONTENT)
        assert read_json(target) == CONTENT and read_json(str(target)) == CONTENT
        assert names(target.parent) == ["report.json"]

    def test_it_can_be_read_by_people(self, target):
        """Indented, in UTF-8 without escapes, whatever the locale, with a last line that ends."""
        write_json(target, {"b": "Füße", "a": [1]})
        assert target.read_bytes() == '{\n  "b": "Füße",\n  "a": [\n    1\n  ]\n}\n'.encode()

    @pytest.mark.parametrize(
        ("content", "error"),
        [({"a": object()}, TypeError), ({"a": {1, 2}}, TypeError), ({(1, 2): 3}, TypeError), ("\ud800", UnicodeEncodeError)],
        ids=["object", "set", "key", "half a character"],
    )
    def test_what_is_no_json_changes_nothing(self, target, content, error):
        before = names(target.parent)
        with pytest.raises(error):
            write_json(target, content)
        assert names(target.parent) == before and (not before or target.read_text() == OLD)

    def test_a_circle_changes_nothing(self, target):
        before, circle = names(target.parent), []
        circle.append(circle)
        with pytest.raises(ValueError, match="Circular"):
            write_json(target, circle)
        assert names(target.parent) == before

    def test_a_file_cut_anywhere_is_refused_by_name(self, target):
        write_json(target, {"a": [1, "Füße", {"b": None}]})
        whole = target.read_bytes()
        # Without the last line's end it is still whole.
        for length in range(len(whole) - 1):
            target.write_bytes(whole[:length])
            with pytest.raises(ValueError, match=r"report\.json is not valid JSON \(.*\); the file is damaged or not one of ours"):
                read_json(target)

    @pytest.mark.parametrize(
        "content",
        [b"", b"\xff\xfe", b"PK\x03\x04", b"{'a': 1}", b'{"a": 1}{', b"[" * 100_000, b"\x00" * 10, b"9" * 5000],
        ids=["empty", "bytes", "archive", "python", "two", "deep", "zeros", "huge number"],
    )
    def test_another_file_is_refused_by_name(self, target, content):
        target.write_bytes(content)
        with pytest.raises(ValueError, match=r"report\.json is not valid JSON") as caught:
            read_json(target)
        assert caught.value.__cause__ is not None

    def test_no_file_is_no_damage(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            read_json(tmp_path / "none.json")
        with pytest.raises(IsADirectoryError):
            read_json(tmp_path)
