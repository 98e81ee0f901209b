from hpcmoe.cli import main

raise SystemExit(main())
