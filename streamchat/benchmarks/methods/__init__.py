"""Methods of handling a long text with one model, one file each: `registry` names them, `stream` runs one."""
