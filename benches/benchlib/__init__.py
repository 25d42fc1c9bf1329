"""What the programs in benches/ share: `host` (processes, CPU, memory, fio, scratch directories), `setups` (what is
measured: plain file, our clusters, peers), `plot` (SVG without any library), `docs` (generated parts of documents)."""
