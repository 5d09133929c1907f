"""bench/layer_memory.py: what it makes of ncu's table."""

READ = "FBSP.TriageCompute.dramc__read_throughput.avg.pct_of_peak_sustained_elapsed"


def test_bands_of_a_layer(bench):
    shares = "0; 0.1; 60; 96.5; 0; 49.9; 5; 70; 90; 0; 0"
    table = f"""ID,{READ},profiler__pmsampler_interval_time
,%,us
0,(0.00; {shares}),1.50 (1.50)"""
    found = bench("layer_memory").bands_of(table, layers=2)
    # From 60 to 90: seven samples.
    assert found == {"us": round(7 * 1.5 / 2, 1), "bands_us": [0.8, 1.5, 0.8, 0.8, 1.5]}
