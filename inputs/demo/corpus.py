"""Three kinds of text from Debian packages, for training the demonstration model.

    python corpus.py --work /tmp/demo-corpus      # fetch, clean, print sizes

Everything comes through `apt-get download` and is unpacked with `dpkg -x` into the
work folder, so nothing is installed. Needed besides: groff (package groff-base).

kind    packages                                    one document is
verse   bible-kjv, bible-kjv-text                   a chapter, one verse a line
man     manpages, manpages-dev                      a page rendered to plain text
python  libpython3.x-minimal, libpython3.x-stdlib   a module
"""

import argparse
import gzip
import hashlib
import re
import subprocess
from pathlib import Path

KINDS = ("verse", "man", "python")

# The `bible` command prints short book names; full names read better.
BOOKS = dict(pair.split("=") for pair in """Ge=Genesis|Exo=Exodus|Lev=Leviticus|Num=Numbers
|Deu=Deuteronomy|Josh=Joshua|Jdgs=Judges|Ruth=Ruth|1Sm=1 Samuel|2Sm=2 Samuel|1Ki=1 Kings
|2Ki=2 Kings|1Chr=1 Chronicles|2Chr=2 Chronicles|Ezra=Ezra|Neh=Nehemiah|Est=Esther|Job=Job
|Psa=Psalms|Prv=Proverbs|Eccl=Ecclesiastes|SSol=Song of Solomon|Isa=Isaiah|Jer=Jeremiah
|Lam=Lamentations|Eze=Ezekiel|Dan=Daniel|Hos=Hosea|Joel=Joel|Amos=Amos|Obad=Obadiah|Jonah=Jonah
|Mic=Micah|Nahum=Nahum|Hab=Habakkuk|Zep=Zephaniah|Hag=Haggai|Zec=Zechariah|Mal=Malachi
|Mat=Matthew|Mark=Mark|Luke=Luke|John=John|Acts=Acts|Rom=Romans|1Cor=1 Corinthians
|2Cor=2 Corinthians|Gal=Galatians|Eph=Ephesians|Phi=Philippians|Col=Colossians
|1Th=1 Thessalonians|2Th=2 Thessalonians|1Tim=1 Timothy|2Tim=2 Timothy|Titus=Titus
|Phmn=Philemon|Heb=Hebrews|Jas=James|1Pet=1 Peter|2Pet=2 Peter|1Jn=1 John|2Jn=2 John|3Jn=3 John
|Jude=Jude|Rev=Revelation""".replace("\n", "").split("|"))

# Tables rather than programs: code pages, the help texts of pydoc, HTML entities, generated files.
NOT_PROGRAMS = re.compile(r"/(encodings/|pydoc_data/|html/entities|_sysconfigdata|lib2to3/pgen2/token"
                          r"|dist-packages/|test/|idlelib/idle_test/)")


def fetch(work, python_version):
    """Download and unpack the packages below `work` once; return the unpacked root."""
    root, debs = work / "root", work / "debs"
    if (work / "complete").exists():
        return root
    root.mkdir(parents=True, exist_ok=True)
    debs.mkdir(exist_ok=True)
    packages = ["bible-kjv", "bible-kjv-text", "manpages", "manpages-dev",
                f"libpython{python_version}-minimal", f"libpython{python_version}-stdlib"]
    subprocess.run(["apt-get", "download", *packages], cwd=debs, check=True)
    for deb in sorted(debs.glob("*.deb")):
        subprocess.run(["dpkg", "-x", deb, root], check=True)
    (work / "complete").write_text("\n".join(sorted(d.name for d in debs.glob("*.deb"))) + "\n")
    return root


def verses(root):
    """One document per chapter: 'Genesis 1:1 In the beginning ...', a line per verse."""
    lib = root / "usr/lib"
    text = subprocess.run([root / "usr/bin/bible", "-f", "-p", f"{lib}/", "gen1:1-rev22:21"],
                          check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    chapters = {}
    for line in text.splitlines():
        found = re.match(r"(\d?[A-Za-z]+)(\d+):(\d+) (.*)", line)
        if found is None:
            continue  # the command's prompt, not a verse
        book, chapter, verse, words = found.groups()
        name = f"{BOOKS[book]} {chapter}"
        chapters.setdefault(name, []).append(f"{name}:{verse} {words.strip()}\n")
    return {name: "".join(lines) for name, lines in chapters.items()}


def man_pages(root):
    """One document per page, from its NAME section on, without page header and footer."""
    pages = {}
    for path in sorted((root / "usr/share/man").glob("man[1-8]/*.gz")):
        source = gzip.open(path).read()
        if path.is_symlink() or source.lstrip().startswith(b".so ") or path.name.startswith("bible"):
            continue  # another name for a page that is already here
        # 78 columns, no hyphenation, and (the macros' own `ad` requests made void) ragged
        # right: words stay whole and spaces single.
        command = ["groff", "-K", "utf-8", "-t", "-e", "-man", "-Tascii", "-P-cbou", "-rLL=78n", "-rHY=0"]
        out = subprocess.run(command, input=b".na\n.de ad\n..\n" + source, capture_output=True,
                             check=True).stdout
        text = out.decode("ascii", "replace")
        start, end = text.find("NAME\n"), text.rstrip().rfind("\n")
        if start < 0:
            continue
        body = re.sub(r"\n{3,}", "\n\n", text[start:end])
        pages[path.name.removesuffix(".gz")] = body.rstrip() + "\n"
    return pages


def modules(root):
    """One document per module, without the comment block before its docstring or imports."""
    out = {}
    for path in sorted(root.glob("usr/lib/python3.*/**/*.py")):
        name = str(path.relative_to(root))
        if path.is_symlink() or NOT_PROGRAMS.search(name):
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # a few old modules are Latin-1
        text = re.sub(r"\A(?:[ \t]*(?:#[^\n]*)?\n)+", "", text).rstrip() + "\n"
        if len(text) > 400:
            out[name] = text.replace("\t", "    ")
    return out


def is_held_out(name, percent=5):
    """The same documents on every machine: a hash of the name decides."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 100 < percent


def load(work, python_version="3.11"):
    """{kind: (training documents, held-out documents)}, each a list of text."""
    root = fetch(Path(work).resolve(), python_version)
    out = {}
    for kind, read in zip(KINDS, (verses, man_pages, modules)):
        documents = read(root)
        out[kind] = ([t for n, t in documents.items() if not is_held_out(n)],
                     [t for n, t in documents.items() if is_held_out(n)])
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, help="folder for downloads and unpacked packages")
    parser.add_argument("--python-version", default="3.11", help="the release's Python, e.g. 3.11 on Debian 12")
    args = parser.parse_args()
    for kind, (train, held) in load(args.work, args.python_version).items():
        sizes = [sum(len(t.encode()) for t in docs) for docs in (train, held)]
        print(f"{kind:7} {len(train):5} documents {sizes[0]:9,} bytes, "
              f"held out {len(held):3} documents {sizes[1]:8,} bytes")
        print("    " + train[0][:160].replace("\n", "\n    "))


if __name__ == "__main__":
    main()
