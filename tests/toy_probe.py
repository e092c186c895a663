"""probe.py BASE [n]: what the base can do."""
import sys, tempfile, random, collections
sys.path[:0] = [".", "data/toy"]
import art, prepare, numpy as np
from pathlib import Path
base=sys.argv[1]; n=int(sys.argv[2]) if len(sys.argv)>2 else 200
sys.argv=["x","--model",base,"--runs",tempfile.mkdtemp(),"--draft-temperature","1","--bits","4"]
args=art.parse(art.make_parser("x"))
rng=random.Random("probe"); probs=[]; recs=[]
while len(recs)<n:
    p=prepare.draw_problem(rng); q=p.text()
    if prepare.for_pretraining(q): continue
    s,a=prepare.solve(p,prepare.Reading()); probs.append(p); recs.append({"id":len(recs),"kind":p.kind,"question":q,"answer":a,"solution":s})
run=art.Run(args); lm=run.model("llm")
d=art.predict(lm,args,recs,1.0)
def kindof(p,o):
    for name,r in [("right",prepare.Reading()),("trap",prepare.Reading(True))]+[("slip",prepare.Reading(False,*z)) for i in range(5) for z in ((frozenset([i]),frozenset()),(frozenset(),frozenset([i])))]+[("trap+slip",prepare.Reading(True,*z)) for i in range(5) for z in ((frozenset([i]),frozenset()),(frozenset(),frozenset([i])))]:
        s,a=prepare.solve(p,r)
        if o["text"]==art.solution_text(s,a): return name
    return "other"
c=collections.Counter(kindof(p,o) for p,o in zip(probs,d)); print("drafts",dict(c))
right=np.array([art.verdict("toy",o,r["answer"]) for o,r in zip(d,recs)])
print("by kind",{k:round(float(right[[r["kind"]==k for r in recs]].mean()),2) for k in prepare.KINDS})
for o,p in [(o,p) for o,p in zip(d,probs) if kindof(p,o)=="other"][:3]: print(p.text(),"\n",o["text"])
g=art.predict(lm,args,recs,0.0); print("greedy right",np.mean([art.verdict("toy",o,r["answer"]) for o,r in zip(g,recs)]))
gold=[{"subquestions":art.subquestions_of(r)} for r in recs]
trap=[{"subquestions":[q for q,_ in prepare.solve(p,prepare.Reading(True))[0]]} for p in probs]
borrow=np.array([prepare.solve(p,prepare.Reading(borrows=frozenset(range(9))))[1]!=prepare.solve(p,prepare.Reading())[1] for p in probs])
for nm,a in (("gold",gold),("trap",trap)):
    f=art.refine(lm,args,recs,d,a); ok=np.array([art.verdict("toy",o,r["answer"]) for o,r in zip(f,recs)])
    print("refined along",nm,ok.mean(),"without borrow",ok[~borrow].mean(),"with",ok[borrow].mean())
    f2=[prepare.solve(p,prepare.Reading(nm=="trap",borrows=frozenset(range(9))))[1]==o["answer"] for p,o in zip(probs,f)]; print("  as hurried",np.mean(f2))
asked=art.ask(lm,args,recs,d); print("self ask: AUC",art.auc([o["p_refine"] for o in asked],~right),"gold sq",np.mean([o["subquestions"]==art.subquestions_of(r) for o,r in zip(asked,recs)]), "echo when wrong", np.mean([o["subquestions"]!=art.subquestions_of(r) for o,r,k in zip(asked,recs,right) if not k]))
prompts=[art.ask_prompt(r,o["text"]) for r,o in zip(recs,d)]
pv=[o["p"] for o in lm.choose(prompts,"Refine:",(" Yes"," No"),["\n".join([*art.subquestions_of(r),"Refine:"]) for r in recs])]
print("verdict on gold sub-questions AUC",art.auc(pv,~right), {k:art.auc(np.array(pv)[m],~right[m]) for k in prepare.KINDS if (m:=np.array([r["kind"]==k for r in recs])).any()})
pm=[o["p"] for o in lm.choose([art.trust_prompt(r,o["text"])+"\nMark:" for r,o in zip(recs,d)],"Mark:",(" wrong"," right"))]
ks=[kindof(p,o) for p,o in zip(probs,d)]
print("mark AUC",art.auc(pm,~right),"slips",art.auc([x for x,k in zip(pm,ks) if k in("right","slip")],[k=="slip" for k in ks if k in("right","slip")]),{k:art.auc(np.array(pm)[m],~right[m]) for k in prepare.KINDS if (m:=np.array([r["kind"]==k for r in recs])).any()})
