def main():
    raise SystemExit("hpcmoe: the command line is being built")
