"""Training a mixture: fresh experts and routers in any model, or those of a built one."""
